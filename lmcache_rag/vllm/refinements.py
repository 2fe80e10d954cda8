"""Which answered prompts are to get exact KV, or hold text that is to be learned, and which piece of that work is
next."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lmcache_rag.conversation.recurrence import free_runs
from lmcache_rag.vllm.isolation import BlockNames, PrefixCache
from lmcache_rag.vllm.metadata import Learning, Refined, RefineJob, Step

if TYPE_CHECKING:
    import numpy as np
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

_QUEUED = 16
"""Who answers so many prompts without a pause does not refine the oldest."""

_SETTLED_S = 0.5
"""An engine is idle when nothing was asked for so long: who asks in a loop is not to wait for a piece each time."""

_PAUSE_S = 0.002

_NO_ROOM_S = 60.0
"""Where the store takes nothing more, or fails, nothing is learned for so long."""


@dataclass(eq=False)
class _Refinement:
    """A prompt and its answer, as far as it is computed.

    Attributes:
        names: of the blocks that are to hold their exact KV.
        steps: what is to be done, the next or the one under way first.
        chats: the namespace in which it is stored; empty where it is not.
        learning: what of it is stored as text that recurs, if anything.
        blocks: reserved for what is computed, from number `first` of the prompt's blocks on.
    """

    request: Request
    token_ids: tuple[int, ...]
    names: BlockNames
    steps: list[Step]
    chats: str = ""
    learning: Learning | None = None
    first: int = 0
    blocks: list[KVCacheBlock] = field(default_factory=list)

    @property
    def whose(self) -> tuple[str, str | None]:
        return self.chats, self.names.cache_salt


class Refinements:
    """A queue; one of them is under way.

    Args:
        prefixes: None where the engine has no prefix cache: then nothing is written.
        max_tokens: what is longer is not refined.
        is_stored: which tokens of a prompt are stored in either of two namespaces: bool.
    """

    def __init__(
        self,
        prefixes: PrefixCache | None,
        block_tokens: int,
        max_tokens: int,
        is_stored: Callable[[tuple[int, ...], str, str], np.ndarray],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefixes = prefixes
        self._block_tokens = block_tokens
        self._max_tokens = max_tokens
        self._is_stored = is_stored
        self._clock = clock
        self._queue: deque[_Refinement] = deque()
        self._under_way: _Refinement | None = None  # the worker half has a piece of it
        self._busy_at = -_SETTLED_S
        self._no_room_at = -_NO_ROOM_S

    def __len__(self) -> int:
        return len(self._queue)

    def refine(self, request: Request, names: BlockNames, chats: str) -> None:
        """Queue a prompt that was answered, to get exact KV. What it continues need not be refined apart.

        Args:
            names: of the blocks that are to hold its exact KV.
            chats: the namespace in which it is stored; empty where it is not to be.
        """
        names = names.extended(request)
        tokens = len(names.hashes) * self._block_tokens
        if not 0 < tokens <= self._max_tokens:
            return
        steps: list[Step] = ["compute", "write", "store"] if chats else ["compute", "write"]
        refinement = _Refinement(copy.copy(request), tuple(request.all_token_ids[:tokens]), names, steps, chats)
        for earlier in list(self._queue):
            continued = refinement.token_ids[: len(earlier.token_ids)] == earlier.token_ids
            if continued and earlier.whose == refinement.whose and earlier.learning is None:
                self._queue.remove(earlier)
        self._add(refinement)

    def learn(self, request: Request, names: BlockNames, learning: Learning) -> None:
        """Queue a prompt that holds text that recurs."""
        runs = tuple(run for run in learning.runs if sum(run) <= self._max_tokens)
        if not runs or self._clock() - self._no_room_at < _NO_ROOM_S:
            return
        token_ids = tuple(request.all_token_ids[: sum(runs[-1])])
        self._add(_Refinement(request, token_ids, names, ["compute", "learn"], learning=replace(learning, runs=runs)))

    def _add(self, refinement: _Refinement) -> None:
        self._queue.append(refinement)
        if len(self._queue) > _QUEUED:
            self._queue.popleft()

    def busy(self) -> None:
        """A request is there."""
        self._busy_at = self._clock()

    def next_job(self) -> RefineJob | None:
        """What the worker half is to do in a step without requests."""
        if not self._queue or self._under_way is not None:
            return None
        if self._clock() - self._busy_at < _SETTLED_S:
            time.sleep(_PAUSE_S)  # vLLM steps on meanwhile
            return None
        refinement = self._queue[0]
        if refinement.learning is not None and not self._is_wanted(refinement, refinement.learning):
            self._queue.popleft()
            return None
        self._under_way = refinement
        held_ids: list[int] = []
        if self._prefixes is not None and refinement.steps[0] in ("compute", "write"):
            held_ids = self._prefixes.blocks(refinement.request, refinement.names)
        if self._prefixes is not None and refinement.steps[0] == "write":
            refinement.first = len(held_ids)
            refinement.blocks = self._prefixes.reserve(len(refinement.names.hashes) - refinement.first)
        return RefineJob(
            refinement.token_ids,
            refinement.steps[0],
            tuple(held_ids[: len(refinement.token_ids) // self._block_tokens]),
            tuple(block.block_id for block in refinement.blocks),
            refinement.first * self._block_tokens,
            refinement.chats,
            refinement.learning,
            last=len(refinement.steps) == 1,
        )

    def _is_wanted(self, refinement: _Refinement, learning: Learning) -> bool:
        """Whether something of what recurs is not stored yet; only that is computed and learned."""
        if refinement.steps[0] != "compute":
            return True
        runs = free_runs(learning.runs, self._is_stored(refinement.token_ids, learning.namespace, learning.learned))
        if runs and runs != learning.runs:
            refinement.learning = replace(learning, runs=runs)
            refinement.token_ids = refinement.token_ids[: sum(runs[-1])]
        return bool(runs)

    def drop(self) -> None:
        """Give up what is under way, or next."""
        given_up = [self._under_way] if self._under_way is not None else list(self._queue)[:1]
        self._under_way = None
        for refinement in given_up:
            if refinement in self._queue:
                self._queue.remove(refinement)

    def take(self, refined: Refined) -> int:
        """What the worker half has done. Returns how many tokens have exact KV in the prefix cache that had none."""
        refinement, self._under_way = self._under_way, None
        assert refinement is not None
        blocks, refinement.blocks = refinement.blocks, []
        if blocks:
            assert self._prefixes is not None
            try:
                if refined.done:
                    self._prefixes.insert(refinement.request, refinement.names, blocks, refinement.first)
            finally:
                self._prefixes.release(blocks)
        if refined.is_full or (refined.failure and refinement.steps[0] == "learn"):
            self._no_room_at = self._clock()
        if refined.done:
            refinement.steps.pop(0)
        if (refined.failure or not refinement.steps) and refinement in self._queue:
            self._queue.remove(refinement)
        return len(blocks) * self._block_tokens if refined.done else 0
