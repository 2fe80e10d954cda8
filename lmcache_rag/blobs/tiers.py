"""Caches in front of a store: fast ones of one machine or one site before a slow one that all share."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

from lmcache_rag.blobs.base import Store
from lmcache_rag.blobs.tier import Cache, Tier, TierStats, is_cacheable
from lmcache_rag.errors import StoreError
from lmcache_rag.process import OwnProcess

_WORKERS = 4
_MOST_PREFETCHED = 512
"""So many names wait to be prefetched at most."""

_MOST_FILLING_BYTES = 256 << 20
"""So many bytes wait in memory to be written to caches at most; what else is read meanwhile is not kept."""

_log = logging.getLogger(__name__)

__all__ = ["Cache", "TierStats", "TieredStore"]


class TieredStore:
    """A store where everything is kept, the origin, with caches before it.

    Reads try the caches, fastest first, and fill them with whole blobs in the background; a part of a blob that no
    cache holds is read from the origin alone. Writes go to the origin first, and then to the caches. What the origin
    says holds: whether a blob exists, its size, and what is listed. A cache that fails is left alone for a while, and
    costs no request anything. Names in the records that may change, or must be seen at once, are never cached.

    Args:
        caches: fastest first.
        label: of the origin.
        pause_s: so long an origin is not read that failed three times in a row.
    """

    def __init__(self, caches: Sequence[Cache], origin: Store, label: str = "origin", *, pause_s: float = 2.0) -> None:
        self.caches = tuple(caches)
        self.origin = origin
        self._origin = Tier(label, origin, failures=3, pause_s=pause_s)
        self._flights: dict[str, Future[memoryview | None]] = {}
        self._filling: dict[str, memoryview] = {}
        self._lock = threading.Lock()
        self._workers = _Workers()
        self._prefetching: set[str] = set()
        self._process = OwnProcess("A store with tiers", StoreError)

    @property
    def remote(self) -> bool:
        return self.origin.remote

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> int:
        self._process.check()
        length = self.origin.write(name, parts)
        self._keep(name, parts)
        return length

    def write_if_absent(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        self._process.check()
        written = self.origin.write_if_absent(name, parts)
        if written:
            self._keep(name, parts)
        return written

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        self._process.check()
        whole = not start and length is None
        if not is_cacheable(name):
            return self._origin.get(lambda: self.origin.read(name, start, length))
        if (data := self._filling.get(name)) is not None:
            return data[start:] if length is None else data[start : start + length]
        for place, cache in enumerate(self.caches):
            data = cache.read(name, start, length)
            if data is not None:
                if whole and place:
                    self._fill_later(name, data, self.caches[:place])
                return data
        if not whole:
            return self._origin.get(lambda: self.origin.read(name, start, length))
        return self._fetched(name)

    def map(self, name: str) -> memoryview | None:
        self._process.check()
        if not is_cacheable(name):
            return self._origin.get(lambda: self.origin.map(name))
        for cache in self.caches:
            if (data := cache.map(name)) is not None:
                return data
        data = self._origin.get(lambda: self.origin.map(name))
        if data is not None:
            self._fill_later(name, data, self.caches)
        return data

    def exists(self, name: str) -> bool:
        return self.origin.exists(name)

    def size(self, name: str) -> int | None:
        return self.origin.size(name)

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        try:
            self.origin.delete(names)
        finally:
            self._drop([name for name in names if is_cacheable(name)])

    def list(self, prefix: str) -> Iterator[str]:
        return self.origin.list(prefix)

    def folders(self, prefix: str) -> Sequence[str]:
        return self.origin.folders(prefix)

    def free_bytes(self) -> int | None:
        return self.origin.free_bytes()

    def heal(self, name: str) -> Store | None:
        if not self.caches or not is_cacheable(name):
            return self.origin.heal(name)
        self._drop([name], damaged=True)
        return self.origin

    def prefetch(self, names: Iterable[str]) -> int:
        """Fill the caches in the background with blobs that the fastest is not known to hold. How many of them are
        taken up; there is a limit, since they are only hints."""
        self._process.check()
        taken = 0
        for name in names if self.caches else ():
            with self._lock:
                known = name in self._prefetching or name in self._filling or name in self.caches[0]
                if known or not is_cacheable(name) or len(self._prefetching) >= _MOST_PREFETCHED:
                    continue
                self._prefetching.add(name)
            taken += 1
            self._workers.run(lambda name=name: self._prefetch(name))  # type: ignore[misc]
        return taken

    def tier_of(self, name: str) -> str | None:
        """The label of the fastest cache that is known to hold a blob, from memory only; None stands for the origin."""
        if name in self._filling:
            return self.caches[0].label
        return next((cache.label for cache in self.caches if name in cache), None)

    def stats(self) -> dict[str, TierStats]:
        """By label, fastest first, the origin last."""
        return {tier.label: tier.stats.snapshot() for tier in (*self.caches, self._origin)}

    def flush(self) -> None:
        """Wait until what is done in the background is done."""
        self._workers.wait()

    def _fetched(self, name: str) -> memoryview | None:
        """A blob from the origin, which is asked once where several want it at the same time."""
        with self._lock:
            if (data := self._filling.get(name)) is not None:
                return data
            flight = self._flights.get(name)
            if first := flight is None:
                flight = self._flights[name] = Future()
        assert flight is not None
        if not first:
            return flight.result()
        try:
            data = self._origin.get(lambda: self.origin.read(name))
            if data is not None:
                self._fill_later(name, data, self.caches)
        except BaseException as error:
            flight.set_exception(error)
            raise
        else:
            flight.set_result(data)
        finally:
            with self._lock:
                del self._flights[name]
        return data

    def _fill_later(self, name: str, data: memoryview, caches: Sequence[Cache]) -> None:
        """Fill caches in the background, where there is room in memory for what waits."""
        if not caches:
            return
        with self._lock:
            waiting = sum(map(len, self._filling.values()))
            if name in self._filling or (waiting and waiting + len(data) > _MOST_FILLING_BYTES):
                return
            self._filling[name] = data
        self._workers.run(lambda: self._fill(name, data, caches), first=True)  # so that memory is free again

    def _fill(self, name: str, data: memoryview, caches: Sequence[Cache]) -> None:
        try:
            for cache in caches:
                if self._filling.get(name) is data:  # not deleted or found damaged meanwhile
                    cache.fill(name, [data])
        finally:
            with self._lock:
                gone = self._filling.get(name) is not data
                if not gone:
                    del self._filling[name]
            if gone:
                for cache in caches:
                    cache.drop([name])

    def _prefetch(self, name: str) -> None:
        try:
            self.read(name)
        except StoreError:
            return  # counted and logged; whoever needs it is told
        finally:
            with self._lock:
                self._prefetching.discard(name)

    def _keep(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write to the caches what the origin has."""
        if is_cacheable(name):
            with self._lock:
                self._filling.pop(name, None)
            for cache in self.caches:
                cache.fill(name, parts)

    def _drop(self, names: Sequence[str], *, damaged: bool = False) -> None:
        with self._lock:
            for name in names:
                self._filling.pop(name, None)
        for cache in self.caches if names else ():
            cache.drop(names, damaged=damaged)


class _Workers:
    """Threads that do what can wait, while there is any. They do not outlive the process."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._threads = 0
        self._changed = threading.Condition()

    def run(self, work: Callable[[], None], *, first: bool = False) -> None:
        with self._changed:
            if first:
                self._waiting.appendleft(work)
            else:
                self._waiting.append(work)
            if self._threads < _WORKERS:
                threading.Thread(target=self._serve, name="lmcache-rag-tiers", daemon=True).start()
                self._threads += 1

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._threads)

    def _serve(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._threads -= 1
                    self._changed.notify_all()
                    return
                work = self._waiting.popleft()
            try:
                work()
            except Exception:  # noqa: BLE001  # nobody waits for it, and other work does
                _log.exception("what a store does in the background failed")
