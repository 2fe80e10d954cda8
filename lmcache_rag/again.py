"""What comes a second time is worth keeping."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable


class SeenOnce:
    """Names that were seen once, the last ones. Not safe to use from several threads.

    Args:
        remembered: how many.
    """

    def __init__(self, remembered: int) -> None:
        self._remembered = remembered
        self._names: OrderedDict[Hashable, None] = OrderedDict()

    def again(self, name: Hashable) -> bool:
        """Whether it is seen for the second time; then it is forgotten."""
        if name in self._names:
            del self._names[name]
            return True
        self._names[name] = None
        if len(self._names) > self._remembered:
            self._names.popitem(last=False)
        return False
