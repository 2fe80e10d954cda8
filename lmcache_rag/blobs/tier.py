"""One of several stores that are used as one: what it did, when to leave it alone, and keeping a cache in bounds."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lmcache_rag.blobs.base import CacheStore, Store
from lmcache_rag.errors import StoreError

_TOUCH_S = 60.0
"""So often at most it is noted on a disk that a blob is used."""

_LOW = 0.9
"""Where a cache is full, it is emptied to this share of its capacity."""

_SCAN_SHARE = 32
_SCAN_S = 10.0
"""What other processes did in a cache is looked up when this one has filled one in so many of its bytes, and before
anything is evicted, but not sooner again than after so many seconds."""

_OBJECT = re.compile(r"[^./][^/]*/.+/[0-9a-f]{2}/[0-9a-f]{4,}/[^/]+\.v\d+")
"""A chunk's object: namespace, model, the key's first digits, the key, form and version."""

_log = logging.getLogger(__name__)


@dataclass
class TierStats:
    """What was done with a tier so far. `read_bytes / seconds` is its rate, `seconds / reads` its latency.

    Attributes:
        reads: how often it was asked for a blob or a part of one.
        read_bytes: what it gave.
        seconds: what reading took, of all threads together.
        hits: how many of the reads found the blob.
        fills: blobs that were written to it.
        evictions: blobs that had to make room.
        failures: how often it could not do what it was asked.
        healed: damaged copies that were dropped.
    """

    reads: int = 0
    read_bytes: int = 0
    seconds: float = 0.0
    hits: int = 0
    fills: int = 0
    evictions: int = 0
    failures: int = 0
    healed: int = 0

    def snapshot(self) -> TierStats:
        """What it is now."""
        return replace(self)


class _Pause:
    """Leaves alone for a while what failed several times in a row."""

    def __init__(self, failures: int, seconds: float) -> None:
        self._most = failures
        self._seconds = seconds
        self._failures = 0
        self._until = 0.0
        self._error = ""

    def reason(self) -> str:
        """Why nothing is tried now; empty where it may be."""
        return self._error if time.monotonic() < self._until else ""

    def worked(self) -> None:
        self._failures, self._until = 0, 0.0

    def failed(self, error: StoreError) -> bool:
        """Whether this is the first failure in a row."""
        self._failures += 1
        if self._failures >= self._most:
            self._until, self._error = time.monotonic() + self._seconds, str(error)
        return self._failures == 1


class Tier:
    """A store, and what it did.

    Args:
        label: what it is called.
        failures: after so many in a row nothing is read for `pause_s`, which would only wait for the next one.
    """

    def __init__(self, label: str, store: Store, *, failures: int, pause_s: float) -> None:
        self.label = label
        self.store = store
        self.stats = TierStats()
        self._lock = threading.Lock()
        self._reading = _Pause(failures, pause_s)

    def get(self, read: Callable[[], memoryview | None]) -> memoryview | None:
        """What `read` reads of the store. Raises `StoreError`, at once where it failed just now."""
        if reason := self._reading.reason():
            raise StoreError(reason)
        start = time.perf_counter()
        try:
            data = read()
        except StoreError as error:
            self._count_failure(self._reading, error)
            raise
        with self._lock:
            self._reading.worked()
            self.stats.reads += 1
            self.stats.seconds += time.perf_counter() - start
            if data is not None:
                self.stats.hits += 1
                self.stats.read_bytes += len(data)
        return data

    def _count_failure(self, pause: _Pause, error: StoreError) -> None:
        with self._lock:
            self.stats.failures += 1
            first = pause.failed(error)
        if first:
            _log.warning("%s failed, and is tried again later (%s)", self.label, error)


@dataclass
class _Held:
    """A blob in a cache.

    Attributes:
        used_s: when it was last used, in seconds since 1970; touched_s: which is known to others.
    """

    size: int
    used_s: float
    touched_s: float = 0.0


class Cache(Tier):
    """A store in front of a slower one. It never fails: where it cannot, it has nothing and keeps nothing.

    What is in it is known from memory, after it was looked through once in the background; what other processes do with
    it is noticed when it is looked through again. Each process keeps to the capacity by itself.

    Args:
        capacity_bytes: within which it is kept; without, it takes what it is given.
    """

    def __init__(
        self, label: str, store: CacheStore, capacity_bytes: int | None = None, *, pause_s: float = 10.0
    ) -> None:
        super().__init__(label, store, failures=1, pause_s=pause_s)
        self.store: CacheStore = store
        self.capacity_bytes = capacity_bytes
        self._writing = _Pause(1, pause_s)
        self._held: dict[str, _Held] = {}
        self._total = 0
        self._written: set[str] = set()  # now, so that they are not evicted
        self._removals = 0
        self._filled_bytes = 0  # since it was looked through
        self._scanned_at = time.monotonic()
        self._is_a_store = False
        self._scanned = threading.Event()
        self._scanning = threading.Lock()
        if capacity_bytes is not None or not store.remote:
            threading.Thread(target=self._scan, name="lmcache-rag-cache", daemon=True).start()
        else:
            self._scanned.set()

    def __contains__(self, name: str) -> bool:
        """Whether it is known to hold a blob; from memory."""
        return name in self._held

    @property
    def size_bytes(self) -> int:
        """Of what it is known to hold."""
        return self._total

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        return self._look_up(name, lambda: self.store.read(name, start, length), start)

    def map(self, name: str) -> memoryview | None:
        return self._look_up(name, lambda: self.store.map(name), 0)

    def fill(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        """Keep a blob, in place of what is there; whether that was done."""
        size = sum(memoryview(part).nbytes for part in parts)
        limits = [self.capacity_bytes, getattr(self.store, "largest_bytes", None)]
        fits = all(limit is None or size <= limit for limit in limits)
        if self._writing.reason() or not fits or self._is_a_store:
            if name in self._held:
                self.drop([name])  # an older one is not to stay
            return False
        try:
            self._make_room(name, size)
            self.store.write(name, parts)
        except StoreError as error:
            self._count_failure(self._writing, error)
            self.drop([name])
            return False
        finally:
            with self._lock:
                self._written.discard(name)
        with self._lock:
            self._writing.worked()
            self.stats.fills += 1
        return True

    def drop(self, names: Iterable[str], *, damaged: bool = False) -> None:
        """Keep blobs no longer. Where nothing can be written now they stay, which harms nobody but where they are
        damaged."""
        names = list(names)
        with self._lock:
            self.stats.healed += damaged and names[0] in self._held
            self._removals += 1
            for name in names:
                self._forget(name)
        if self._is_a_store or (self._writing.reason() and not damaged):
            return
        try:
            self.store.delete(names)
        except StoreError as error:
            self._count_failure(self._writing, error)

    def _look_up(self, name: str, read: Callable[[], memoryview | None], start: int) -> memoryview | None:
        if self._is_a_store or self._reading.reason():
            return None
        removals = self._removals
        try:
            data = self.get(read)
        except StoreError:
            return None  # counted and logged
        now, touch = time.time(), False
        with self._lock:
            if data is None:
                if name not in self._written:
                    self._forget(name)
                return None
            held = self._held.get(name)
            if held is None and removals != self._removals:
                return data  # it may have been evicted after it was read
            held = held or self._hold(name, start + len(data), now)
            held.used_s = now
            if now - held.touched_s > _TOUCH_S:
                held.touched_s, touch = now, True
        if touch:
            self.store.touch(name)
        return data

    def _make_room(self, name: str, size: int) -> None:
        """Count a blob as held, and evict others where there is no room for it. Raises `StoreError`."""
        with self._lock:
            self._forget(name)
            self._hold(name, size, time.time())
            self._written.add(name)
            self._filled_bytes += size
            capacity = self.capacity_bytes
            if capacity is None:
                return
            due = self._filled_bytes > capacity / _SCAN_SHARE or self._total > capacity
            due = due and time.monotonic() - self._scanned_at > _SCAN_S
        self._scanned.wait()
        if due:
            self._scan()
        with self._lock:
            if self._total <= capacity or self._is_a_store:
                return
            oldest = sorted((held.used_s, other) for other, held in self._held.items() if other not in self._written)
            evicted = []
            for _, other in oldest:
                if self._total <= max(_LOW * capacity, size):
                    break
                self._forget(other)
                evicted.append(other)
            self.stats.evictions += len(evicted)
            self._removals += 1
        self.store.delete(evicted)

    def _scan(self) -> None:
        """Look through what there is. What else lies there is neither counted nor evicted: it may be somebody's only
        copy."""
        with self._scanning:
            try:
                begun = time.time()
                entries = list(self.store.entries())
            except StoreError as error:
                self._count_failure(self._reading, error)
            else:
                self._take_over(entries, begun)
            finally:
                self._scanned_at = time.monotonic()
                self._scanned.set()

    def _take_over(self, entries: Sequence[tuple[str, int, float]], begun: float) -> None:
        found = {name: _Held(size, used_s, used_s) for name, size, used_s in entries if is_cacheable(name)}
        if not self._is_a_store and any(_is_of_a_store(name) for name, _, _ in entries):
            self._is_a_store = True
            _log.warning("%s is a store itself, so it is not used as a cache: name another place (--tier).", self.label)
        with self._lock:
            for name, held in self._held.items():
                there = found.get(name)
                if name in self._written or (there is None and held.used_s >= begun):
                    found[name] = held
                elif there is not None and held.used_s > there.used_s:  # of what was read in part, only it knows all
                    there.used_s, there.touched_s = held.used_s, held.touched_s
            self._held, self._total = found, sum(held.size for held in found.values())
            self._filled_bytes = 0

    def _hold(self, name: str, size: int, used_s: float) -> _Held:
        held = self._held[name] = _Held(size, used_s, used_s)
        self._total += size
        return held

    def _forget(self, name: str) -> None:
        held = self._held.pop(name, None)
        self._total -= held.size if held is not None else 0


def is_cacheable(name: str) -> bool:
    """Whether a cache may hold it: chunks' objects, tables, and of the records, which change or must be seen at once,
    the large parts alone. What a store says of itself is not: a cache may be that of several stores."""
    folders = name.split("/")
    if folders[0] == ".records":
        return folders[-2:-1] == ["parts"]
    return folders[0] == ".tables" or bool(_OBJECT.fullmatch(name))


def _is_of_a_store(name: str) -> bool:
    """Whether only a store has it, and no cache."""
    return name.startswith(".records/") and not is_cacheable(name)
