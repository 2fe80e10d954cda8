"""Which answered prompts are to get exact KV, and which piece of that work is next."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lmcache_rag.vllm.isolation import BlockNames, PrefixCache
from lmcache_rag.vllm.metadata import Refined, RefineJob

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

_QUEUED = 16
"""Who answers so many prompts without a pause does not refine the oldest."""

_SETTLED_S = 0.5
"""An engine is idle when nothing was asked for so long: who asks in a loop is not to wait for a piece each time."""

_PAUSE_S = 0.002


@dataclass(eq=False)
class _Refinement:
    """A prompt and its answer.

    Attributes:
        names: of the blocks that are to hold their exact KV.
        chats: the namespace in which it is stored; empty where it is not.
        step: what is to be done next, or under way.
        blocks: reserved for what is computed, from number `first` of the prompt's blocks on.
    """

    request: Request
    token_ids: tuple[int, ...]
    names: BlockNames
    chats: str
    step: Literal["compute", "write", "store"] = "compute"
    first: int = 0
    blocks: list[KVCacheBlock] = field(default_factory=list)

    @property
    def last_step(self) -> str:
        return "store" if self.chats else "write"


class Refinements:
    """A queue; one of them is under way.

    Args:
        max_tokens: what is longer is not refined.
    """

    def __init__(
        self, prefixes: PrefixCache, block_tokens: int, max_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._prefixes = prefixes
        self._block_tokens = block_tokens
        self._max_tokens = max_tokens
        self._clock = clock
        self._queue: deque[_Refinement] = deque()
        self._under_way: _Refinement | None = None  # the worker half has a piece of it
        self._busy_at = -_SETTLED_S

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, request: Request, names: BlockNames, chats: str) -> None:
        """Queue a prompt that was answered. What it continues need not be refined apart.

        Args:
            names: of the blocks that are to hold its exact KV.
            chats: the namespace in which it is stored; empty where it is not to be.
        """
        names = names.extended(request)
        tokens = len(names.hashes) * self._block_tokens
        if not 0 < tokens <= self._max_tokens:
            return
        token_ids = tuple(request.all_token_ids[:tokens])
        for earlier in list(self._queue):
            alike = (earlier.chats, earlier.names.cache_salt) == (chats, names.cache_salt)
            if alike and token_ids[: len(earlier.token_ids)] == earlier.token_ids:
                self._queue.remove(earlier)
        self._queue.append(_Refinement(copy.copy(request), token_ids, names, chats))
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
        refinement = self._under_way = self._queue[0]
        if refinement.step == "write":
            held = self._prefixes.held(refinement.request, refinement.names)
            refinement.first = held // self._block_tokens
            refinement.blocks = self._prefixes.reserve(len(refinement.names.hashes) - refinement.first)
        return RefineJob(
            refinement.token_ids,
            refinement.step,
            tuple(block.block_id for block in refinement.blocks),
            refinement.first * self._block_tokens,
            refinement.chats,
            last=len(self._queue) == 1 and refinement.step == refinement.last_step,
        )

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
        try:
            if blocks and refined.done:
                self._prefixes.insert(refinement.request, refinement.names, blocks, refinement.first)
        finally:
            self._prefixes.release(blocks)
        last = refinement.step == refinement.last_step
        if (refined.failure or (refined.done and last)) and refinement in self._queue:
            self._queue.remove(refinement)
        if refined.done and not last:
            refinement.step = "write" if refinement.step == "compute" else "store"
        return len(blocks) * self._block_tokens if refined.done else 0
