"""The order of a prompt's passages: that of an earlier prompt, so that its beginning is found in the prefix cache."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

Passage = TypeVar("Passage")

_REMEMBERED = 256


class PassageOrder:
    """Remembers in which order passages were prompted, and puts those of the next prompt into the same one as far as
    they are the same from the first on. The others follow by falling relevance.

    Args:
        most_moved: no passage comes more places earlier or later than its relevance says, so that a passage that
            matters little does not come before all those that matter much.
    """

    def __init__(self, most_moved: int = 4, remembered: int = _REMEMBERED) -> None:
        self._most_moved = most_moved
        self._orders: deque[tuple[Hashable, ...]] = deque(maxlen=remembered)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def ordered(self, passages: Sequence[Passage], key: Callable[[Passage], Hashable]) -> list[Passage]:
        """The passages, which come by falling relevance, in their order for the prompt.

        Args:
            key: what is equal for equal passages: their text.
        """
        keys = [key(passage) for passage in passages]
        ranks = {key: rank for rank, key in reversed(list(enumerate(keys)))}
        with self._lock:
            begun = max((self._beginning(earlier, ranks) for earlier in self._orders), key=len, default=[])
            order = begun + [rank for rank in range(len(keys)) if rank not in set(begun)]
            self._remember(tuple(keys[rank] for rank in order))
        return [passages[rank] for rank in order]

    def _beginning(self, earlier: Sequence[Hashable], ranks: dict[Hashable, int]) -> list[int]:
        """The ranks of the passages with which an earlier prompt began and this one may begin too."""
        begun: list[int] = []
        for key in earlier:
            if key not in ranks or ranks[key] in begun:
                break
            begun.append(ranks[key])
        while begun and self._moved(begun, len(ranks)) > self._most_moved:
            begun.pop()
        return begun

    def _moved(self, begun: Sequence[int], passages: int) -> int:
        """How far the passage is moved that is moved furthest."""
        rest = [rank for rank in range(passages) if rank not in set(begun)]
        return max(abs(rank - place) for place, rank in enumerate([*begun, *rest]))

    def _remember(self, order: tuple[Hashable, ...]) -> None:
        if order in self._orders:
            self._orders.remove(order)
        self._orders.appendleft(order)  # of beginnings that are equally long, that of the last prompt is taken
