"""Reading what a plan names: several objects at a time, and no longer than computing would take."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDoneError

from lmcache_rag.blend.streaming import Stream
from lmcache_rag.chunk_kv import KVShape, StoredForm
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.hot import HeldKV, HotChunks
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.plan.cost import GIVE_UP_SHARE, REMEMBERED_S
from lmcache_rag.plan.plan import PlannedSegment
from lmcache_rag.process import OwnProcess

_AT_A_TIME = 4
_READERS = 2 * _AT_A_TIME
"""As many reads as a plan has at a time may hang before the next plan reads with fewer threads."""

_AHEAD = 2 * _AT_A_TIME
"""So many objects of a plan are read and not yet taken."""

_LARGE_BYTES = 1 << 20
"""What is smaller tells a store's latency, not its bandwidth."""

_PATIENCE_S = 0.25
"""Loading is not given up before, however little there is to compute."""

_WHILE_OTHERS_RUN = 4
"""A blend that is not alone computes so many times as long, so its reads may take as long."""

_AT_A_TIME_CHOSEN = 2
"""Where forms are chosen as the store's rate becomes known, fewer objects are chosen ahead."""

_TOO_SLOW = "too slow"
_CHEAPER = "cheaper to compute"

Loaded = LoadedKV | HeldKV
"""What was read, or was in memory already."""

_Read = Future[tuple[Loaded | str, float]]


class Loader:
    """Reads stored objects.

    Args:
        prefill_tokens_per_s: how fast tokens are computed; infinite patience is asked for by 0.

    Attributes:
        bytes_per_s: how fast the last plan's objects were read, by tier; none where too little was to tell, or several
            tiers were read, unless one was given up.
    """

    def __init__(self, shape: KVShape, prefill_tokens_per_s: float) -> None:
        self.bytes_per_s: dict[str, float] = {}
        self._shape = shape
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._slow_until: dict[str, float] = {}
        self._last_rate = (0.0, -math.inf)
        self._readers = _Readers()

    def load(
        self,
        chunks: ChunkStores | HotChunks,
        segments: Sequence[PlannedSegment],
        tokens: int,
        seconds: float | None = None,
        may_wait: Callable[[], bool] = lambda: True,
        paused_s: Callable[[], float] = lambda: 0.0,
    ) -> Iterator[tuple[PlannedSegment, Loaded | str] | None]:
        """Each segment that names an object, in order, with what was read or why it cannot be used; None for as long as
        the next one is not there, where it is not to be waited for.

        Args:
            tokens: of the whole plan. Reading is given up when computing them would be well under way, and then nothing
                is read from that tier for a while: requests that were planned before this was known are not to wait
                again. Nor is anything read while all readers hang.
            may_wait: asked while something is not there yet.
            paused_s: the seconds in which the caller did something else, so far; see `_Patience`.
            seconds: by when loading is to be done, where the segments have forms to choose from.
        """
        named = [segment for segment in segments if segment.name is not None]
        self.bytes_per_s = {}
        start = time.perf_counter()
        slow = self._slow(named, chunks)
        paused, patience = paused_s(), _Patience(self._patience_s(tokens), paused_s)
        wanted = [segment for segment in named if segment not in slow]
        reads = _Reads(self._readers, chunks, self._shape, wanted, self._stream(wanted, tokens, seconds))
        sizes, last, ended, gave_up = Counter[str](), "", start, False
        try:
            futures = iter(reads.futures)
            for segment in named:
                if segment in slow:
                    yield segment, _TOO_SLOW
                    continue
                read = next(futures)
                yield from patience.pauses(read, may_wait)
                result, at = _result(read, patience.deadline)
                if not isinstance(result, str):
                    sizes[segment.tier] += result.size_bytes
                elif result == _TOO_SLOW:
                    reads.stop()
                    if read in reads.begun:  # others waited for a place
                        gave_up = True
                        self._slow_until[segment.tier] = at + REMEMBERED_S
                if at > ended and read in reads.begun:
                    ended, last = at, segment.tier
                reads.taken()
                yield segment, result
        finally:
            reads.stop()
        if paused_s() > paused and len(wanted) > _AHEAD and not gave_up:
            return  # some reads were begun when the caller came back
        alone = sum(map(bool, sizes.values())) < 2  # of several tiers nobody knows which one took how long
        if (alone and sizes[last] >= _LARGE_BYTES) or gave_up:  # of what was given up, nothing was read
            self.bytes_per_s = {last: max(1, sizes[last]) / max(ended - start, 1e-6)}
            self._last_rate = (self.bytes_per_s[last], ended)

    def _stream(self, segments: Sequence[PlannedSegment], tokens: int, seconds: float | None) -> Stream | None:
        if seconds is None:
            return None
        in_time = min(seconds, self._patience_s(tokens))
        return Stream(segments, in_time, self._known_rate(), self._prefill_tokens_per_s)

    def _slow(self, segments: Sequence[PlannedSegment], chunks: ChunkStores | HotChunks) -> set[PlannedSegment]:
        """Those that are not to be read, since their tier was too slow lately, or all readers hang; what is in memory
        is not read."""
        hang, now = self._readers.hang(), time.perf_counter()
        hot = chunks.holds if isinstance(chunks, HotChunks) else lambda _: False
        return {
            segment
            for segment in segments
            if (hang or now < self._slow_until.get(segment.tier, -math.inf)) and not hot(segment.name or "")
        }

    def _known_rate(self) -> float | None:
        """How fast the store was lately."""
        rate, at = self._last_rate
        return rate if time.perf_counter() - at < REMEMBERED_S else None

    def _patience_s(self, tokens: int) -> float:
        if not self._prefill_tokens_per_s:
            return math.inf
        return max(_PATIENCE_S, GIVE_UP_SHARE * tokens / self._prefill_tokens_per_s)


class _Patience:
    """How long a plan's objects are waited for. The caller's pauses are no fault of the store, but for those in which
    the next object was waited for, since reads go on meanwhile.

    Args:
        paused_s: the seconds of all pauses so far.
    """

    def __init__(self, seconds: float, paused_s: Callable[[], float]) -> None:
        self._end = time.perf_counter() + seconds - paused_s()
        self._paused_s = paused_s
        self._waited_s = 0.0
        self._excused_s = (_WHILE_OTHERS_RUN - 1) * seconds

    @property
    def deadline(self) -> float:
        """When it ends, as things are now."""
        return self._end + self._paused_s() - max(0.0, self._waited_s - self._excused_s)

    def pauses(self, read: _Read, may_wait: Callable[[], bool]) -> Iterator[None]:
        """One after the other, until the object is there or is to be waited for, or patience has ended."""
        while not read.done() and time.perf_counter() < self.deadline and not may_wait():
            before = self._paused_s()
            yield None
            self._waited_s += self._paused_s() - before


class _Readers:
    """Threads that read for all plans, `_READERS` at most. They do not outlive the process, so that a read that hangs
    does not hold up its end."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._threads = 0
        self._moved_at = 0.0  # when one of them last took up something
        self._process = OwnProcess("A loader of stored KV")
        self._lock = threading.Lock()

    def run(self, work: Callable[[], None]) -> None:
        """Have `work`, which raises nothing, done in a thread, as soon as there is one."""
        self._process.check()
        with self._lock:
            self._waiting.append(work)
            if self._threads == _READERS:
                return
            thread = threading.Thread(target=self._serve, name="lmcache-rag-load", daemon=True)
            thread.start()  # raises where the system has no more threads
            self._threads += 1
            self._moved_at = time.perf_counter()

    def hang(self) -> bool:
        """Whether all threads are busy, and have been with the same things for long."""
        return self._threads == _READERS and time.perf_counter() - self._moved_at > _PATIENCE_S

    def _serve(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                work = self._waiting.popleft()
                self._moved_at = time.perf_counter()
            work()


class _Reads:
    """The reads of one plan. A read that hangs holds up no other plan's."""

    def __init__(
        self,
        readers: _Readers,
        chunks: ChunkStores | HotChunks,
        shape: KVShape,
        segments: Sequence[PlannedSegment],
        stream: Stream | None,
    ) -> None:
        self.futures: list[_Read] = [Future() for _ in segments]
        self.begun: set[_Read] = set()
        self._readers = readers
        self._chunks = chunks
        self._shape = shape
        self._stream = stream
        self._waiting = deque(zip(segments, self.futures, strict=True))
        self._at_a_time = _AT_A_TIME if stream is None else _AT_A_TIME_CHOSEN
        self._workers = 0
        self._room = _AHEAD
        self._lock = threading.Lock()
        self._go_on()

    def taken(self) -> None:
        """The next object in order was taken."""
        with self._lock:
            self._room += 1
        self._go_on()

    def stop(self) -> None:
        """Begin no further reads."""
        with self._lock:
            self._waiting.clear()

    def _go_on(self) -> None:
        """Have as many at work as there are reads to begin."""
        with self._lock:
            more = min(self._at_a_time - self._workers, self._room, len(self._waiting))
            self._workers += max(0, more)
        for _ in range(more):
            self._readers.run(self._work)

    def _work(self) -> None:
        while True:
            with self._lock:  # so that choices are made in the segments' order
                if not self._waiting or not self._room:
                    self._workers -= 1
                    return
                self._room -= 1
                segment, read = self._waiting.popleft()
                self.begun.add(read)
                try:
                    form = self._stream.choose() if self._stream is not None else None
                except BaseException as error:  # noqa: BLE001  # raised again where the result is taken
                    read.set_exception(error)
                    continue
            try:
                read.set_result((self._load(segment, form), time.perf_counter()))
            except BaseException as error:  # noqa: BLE001  # raised again where the result is taken
                read.set_exception(error)

    def _load(self, segment: PlannedSegment, form: StoredForm | None) -> Loaded | str:
        if self._stream is None:
            return self._chunks.load(segment.name or "", self._shape, segment.part)
        if form is None:
            return _CHEAPER
        found: Loaded | str = ""
        try:
            found = self._chunks.load(form.name, self._shape)
        finally:
            self._stream.loaded(form, 0 if isinstance(found, str) else found.size_bytes or None)
        return found


def _result(read: _Read, deadline: float) -> tuple[Loaded | str, float]:
    """What a read gave and when."""
    try:
        left = deadline - time.perf_counter()
        return read.result(None if math.isinf(left) else max(0.0, left))
    except NotDoneError:
        return _TOO_SLOW, time.perf_counter()
