"""Chunks that a thread stores while vLLM steps on: encoding takes long, and a store over a network longer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

import numpy as np

from lmcache_rag.chunk_kv import ChunkKV, key_of, variant_of
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.room import Rooms
from lmcache_rag.plan.plan import BlendPlan
from lmcache_rag.request import ReuseReport
from lmcache_rag.vllm.failures import Failures
from lmcache_rag.vllm.saver import Saver

MOST_SAVING = 4
"""So many chunks wait in memory to be stored at most; the scheduler half sees to it."""

PAUSE_S = 0.001
"""So long a step waits for a thread where it has nothing else to do."""


What = tuple[str, bytes, str]
"""Namespace, key and variant of a chunk."""


@dataclass(frozen=True)
class Made:
    """What a precompute request makes: a chunk's variant, from token `start` of its prompt on.

    Attributes:
        preamble, chunk: token ids, int32.
    """

    namespace: str
    preamble: np.ndarray
    start: int
    chunk: np.ndarray
    variant: str

    @classmethod
    def by(cls, plan: BlendPlan) -> Made:
        """What the request of a plan makes."""
        token_ids, segment = np.array(plan.token_ids, np.int32), plan.segments[0]
        preamble = token_ids[: segment.start - plan.primer_tokens]
        variant = variant_of(preamble, token_ids[len(preamble) : segment.start])
        return cls(plan.namespace, preamble, segment.start, token_ids[segment.start : segment.end], variant)

    @property
    def what(self) -> What:
        return self.namespace, key_of(self.chunk), self.variant


@dataclass(frozen=True)
class Saved:
    """What was stored.

    Attributes:
        tokens: of chunks.
        preamble_tokens: of the preamble, where that was stored too.
        is_full: there was no room for some of it.
    """

    size_bytes: int = 0
    tokens: int = 0
    preamble_tokens: int = 0
    is_full: bool = False


def save_in_order(chunks: ChunkStore, wanted: Sequence[tuple[ChunkKV, str]]) -> Saved:
    """Store what is missing, in order, as far as there is room: what follows a piece that is missing is of no use. What
    another engine has stored meanwhile is not missing."""
    stored_bytes = tokens = 0
    for kv, variant in wanted:
        saved_bytes = chunks.save(kv, variant)
        if saved_bytes:
            stored_bytes, tokens = stored_bytes + saved_bytes, tokens + kv.tokens
        elif chunks.missing(kv.token_ids, variant):
            return Saved(stored_bytes, tokens, is_full=True)
    return Saved(stored_bytes, tokens)


def save_behind(chunks: ChunkStore, preamble: ChunkKV, chunk: ChunkKV, variant: str) -> Saved:
    """Store a chunk, and the preamble that it was computed behind, where they are missing."""
    chunks.refresh()
    is_new = chunks.lacks_preamble(preamble.token_ids)
    preamble_bytes = chunks.save_preamble(preamble) if is_new else 0
    saved = save_in_order(chunks, [(chunk, variant)] if chunks.missing(chunk.token_ids, variant) else [])
    return Saved(
        preamble_bytes + saved.size_bytes, saved.tokens, preamble.tokens if is_new else 0, is_full=saved.is_full
    )


@dataclass(frozen=True)
class _Waiting:
    """A request that waits for a chunk to be stored.

    Attributes:
        report: to be completed.
        is_own: whether the chunk was computed for it, or for one before it.
    """

    report: ReuseReport
    what: What
    begun_at: float
    saved: Future[Saved]
    is_own: bool = True


class Saving:
    """Precompute requests whose chunks are being stored. Each is answered when that is done.

    Args:
        thread: that stores, one chunk after another.
        rooms: in which others may have to go.
    """

    def __init__(self, thread: Saver, rooms: Rooms, failures: Failures) -> None:
        self._thread = thread
        self._rooms = rooms
        self._failures = failures
        self._under_way: dict[str, _Waiting] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._under_way

    def begin(
        self, request_id: str, report: ReuseReport, what: What, save: Callable[[], Saved], *, here: bool = False
    ) -> None:
        """Have the thread store a request's chunk.

        Args:
            report: of the request, to be completed.
            here: store it now, and not by the thread.
        """
        begun_at = time.perf_counter()
        saved = _done(save) if here else self._thread.submit(save)
        self._under_way[request_id] = _Waiting(report, what, begun_at, saved)

    def join(self, request_id: str, report: ReuseReport, what: What) -> bool:
        """Have a request wait for a chunk that is being stored for another; False where it is not."""
        for other in self._under_way.values():
            if other.what == what:
                waiting = _Waiting(report, what, time.perf_counter(), other.saved, is_own=False)
                self._under_way[request_id] = waiting
                return True
        return False

    def take(self, wait_s: float = 0.0) -> Iterator[tuple[str, ReuseReport]]:
        """The requests whose chunks are stored, or could not be, and their reports.

        Args:
            wait_s: so long it is waited for one.
        """
        if wait_s:
            wait([waiting.saved for waiting in self._under_way.values()], wait_s, FIRST_COMPLETED)
        for request_id, waiting in list(self._under_way.items()):
            if waiting.saved.done():
                del self._under_way[request_id]
                self._complete(waiting)
                yield request_id, waiting.report

    def _complete(self, waiting: _Waiting) -> None:
        report = waiting.report
        report.phases_s["store"] = time.perf_counter() - waiting.begun_at
        evicted = self._rooms.take_evicted()
        report.evicted_objects, report.evicted_bytes = evicted.objects, evicted.size_bytes
        try:
            saved = waiting.saved.result()
        except StoreError as error:
            report.reason = str(error)
        except Exception as error:  # noqa: BLE001  # the blend is done, and the request can be answered
            report.failure = self._failures.note("Storing KV", error)
            report.reason = f"failed: {report.failure}"
        else:
            if waiting.is_own:
                report.bytes_stored = saved.size_bytes
                report.stored_tokens = saved.preamble_tokens + saved.tokens


def _done(save: Callable[[], Saved]) -> Future[Saved]:
    saved: Future[Saved] = Future()
    try:
        saved.set_result(save())
    except Exception as error:  # noqa: BLE001  # whoever asks for the result gets it
        saved.set_exception(error)
    return saved
