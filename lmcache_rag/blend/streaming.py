"""Which form of each chunk to load when an answer has to begin in time: the adaptive streaming of CacheGen (Liu et al.
2024, SIGCOMM, https://arxiv.org/abs/2310.07240)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from lmcache_rag.chunk_kv import StoredForm
from lmcache_rag.plan.plan import PlannedSegment

_WINDOW = 3
"""The store's rate is that of the last so many objects, so that a change is soon seen."""


class Stream:
    """One plan's loading. For each chunk in turn it takes the highest fidelity at which this chunk and all that follow
    can still be loaded in time, and the lowest, or computing, where none can.

    Args:
        segments: with their forms, in the order of loading.
        seconds: by when all is to be loaded.
        bytes_per_s: how fast the store was when it was last read; None where nobody knows.
        tokens_per_s: how fast tokens are computed; 0 where they are not to be.
    """

    def __init__(
        self,
        segments: Sequence[PlannedSegment],
        seconds: float,
        bytes_per_s: float | None,
        tokens_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._waiting = deque(_worth_choosing(segment) for segment in segments)
        self._bytes_per_s = bytes_per_s
        self._tokens_per_s = tokens_per_s
        self._clock = clock
        self._deadline = clock() + seconds
        self._done: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=_WINDOW + 1)
        self._under_way = 0
        self._lock = threading.Lock()

    def choose(self) -> StoredForm | None:
        """What to load of the next segment; None where computing it is faster."""
        with self._lock:
            segment = self._waiting.popleft()
            chosen = self._best(segment)
            if chosen is not None:
                self._under_way += chosen.size_bytes
            elif segment.forms:
                self._deadline -= segment.length / self._tokens_per_s
            return chosen

    def loaded(self, form: StoredForm, size_bytes: int | None) -> None:
        """What was chosen is loaded: so many bytes, none where that failed; None where it was in memory, which says
        nothing of the store."""
        with self._lock:
            self._under_way -= form.size_bytes
            if size_bytes is not None:
                self._done.append((self._clock(), size_bytes))

    def _best(self, segment: PlannedSegment) -> StoredForm | None:
        rate, left = self._rate(), self._deadline - self._clock()
        if rate is None or not segment.forms:
            return next((form for form in segment.forms if form.name == segment.name), None)
        for place, form in enumerate(segment.forms):
            following = sum(_size(other, place) for other in self._waiting)
            if self._under_way + form.size_bytes + following <= rate * left:
                return form
        smallest = segment.forms[-1]
        faster = smallest.size_bytes * self._tokens_per_s < segment.length * rate
        return smallest if faster or not self._tokens_per_s else None

    def _rate(self) -> float | None:
        """Bytes per second over the last objects, the wait for the next one included, so that a stall counts too."""
        if len(self._done) == 1:
            return self._bytes_per_s
        start = self._done[0][0]
        return sum(size for _, size in list(self._done)[1:]) / max(self._clock() - start, 1e-6)


def _worth_choosing(segment: PlannedSegment) -> PlannedSegment:
    """The segment without the forms that are not smaller than one of higher fidelity, which is the better choice.
    Where its own form is among those, the next one above takes its place."""
    kept: list[StoredForm] = []
    own = None
    for form in segment.forms:
        if not kept or form.size_bytes < kept[-1].size_bytes:
            kept.append(form)
        if form.name == segment.name:
            own = kept[-1].name
    return replace(segment, name=own, forms=tuple(kept))


def _size(segment: PlannedSegment, place: int) -> int:
    """Of the form at this place, or of the last one."""
    return segment.forms[min(place, len(segment.forms) - 1)].size_bytes if segment.forms else 0
