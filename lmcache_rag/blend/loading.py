"""Reading what a plan names: several objects at a time, and no longer than computing would take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDoneError

from lmcache_rag.blend.cost import GIVE_UP_SHARE
from lmcache_rag.blend.plan import PlannedSegment
from lmcache_rag.store.chunks import ChunkStore, KVShape, LoadedKV

_AT_A_TIME = 4
_LARGE_BYTES = 1 << 20
"""What is smaller tells a store's latency, not its bandwidth, and is taken to have been as large as this."""

_PATIENCE_S = 0.25
"""Loading is not given up before, however little there is to compute."""


class Loader:
    """Reads stored objects in threads of its own.

    Attributes:
        bytes_per_s: how fast the last plan's objects were read, at most; None where nothing was.
    """

    def __init__(self, shape: KVShape, prefill_tokens_per_s: float) -> None:
        self.bytes_per_s: float | None = None
        self._shape = shape
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._pool = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="lmcache-rag-load")

    def load(
        self, chunks: ChunkStore, segments: Sequence[PlannedSegment], tokens: int
    ) -> Iterator[tuple[PlannedSegment, LoadedKV | str]]:
        """Each segment that names an object, in order, with what was read or why it cannot be used.

        Args:
            tokens: of the whole plan. Reading is given up when computing them would be well under way.
        """
        start = time.perf_counter()
        deadline = start + max(_PATIENCE_S, GIVE_UP_SHARE * tokens / self._prefill_tokens_per_s)
        reads = [(segment, self._pool.submit(self._read, chunks, segment)) for segment in segments if segment.name]
        size_bytes, ended, given_up = 0, start, False
        for segment, read in reads:
            result, at = _result(read, deadline)
            if isinstance(result, LoadedKV):
                size_bytes += result.size_bytes
            given_up |= result == _TOO_SLOW
            ended = max(ended, at)
            yield segment, result
        self.bytes_per_s = None
        if size_bytes or given_up:  # what was given up counts as nothing: how slow it is was not seen
            counted = size_bytes if given_up else max(size_bytes, _LARGE_BYTES)
            self.bytes_per_s = max(1, counted) / max(ended - start, 1e-6)

    def _read(self, chunks: ChunkStore, segment: PlannedSegment) -> tuple[LoadedKV | str, float]:
        assert segment.name is not None
        return chunks.load(segment.name, self._shape), time.perf_counter()


_TOO_SLOW = "too slow"


def _result(read: Future[tuple[LoadedKV | str, float]], deadline: float) -> tuple[LoadedKV | str, float]:
    """What a read gave and when."""
    try:
        return read.result(max(0.0, deadline - time.perf_counter()))
    except NotDoneError:
        read.cancel()
        return _TOO_SLOW, time.perf_counter()
