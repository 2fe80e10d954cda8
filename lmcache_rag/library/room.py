"""How much a namespace may hold, and what is deleted to keep to it."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import NO_CONTEXT, KVScope, preamble_of
from lmcache_rag.codec import LOSSLESS_CODEC
from lmcache_rag.errors import StoreError
from lmcache_rag.library.calendar import Calendar
from lmcache_rag.library.chains import chained
from lmcache_rag.library.eviction import EVICTION, Candidates
from lmcache_rag.library.names import beside, is_chats, is_incidental, object_name
from lmcache_rag.library.scopes import recorded_scopes
from lmcache_rag.library.uses import INTERVAL_S
from lmcache_rag.records.merge import Live
from lmcache_rag.records.records import Records, owner_number

PINNED = owner_number("pinned")
"""Owner of what is never evicted."""

PREAMBLE = f"{NO_CONTEXT}.{LOSSLESS_CODEC}"
"""The form of preambles. They are kept lossless, whatever the codec of chunks, since all prompts share them, what a
model makes of its first tokens matters most, and vLLM's prefix cache may then keep them too."""

DAY_S = 24 * 3600

_LOW = 0.9
"""Where the limit is reached, so much of it is left."""

_AT_ONCE = 0.01
"""So much of the limit is recorded as gone before it is deleted, so that others do not fill it meanwhile."""

_OFTEN = 8
"""So many scopes are followed at each save; where there are more, once in `_LOOK_S`."""

_LOOK_S = 5.0
_EXPIRE_S = 3600.0
"""So often it is looked for what has expired."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much a namespace holds, together with its conversations, and how long.

    Attributes:
        capacity_bytes: of all stored objects; None for no limit.
        ttl_s: chunks that were not used for so long are deleted; None for never.
        conversations_ttl_s: the same of conversations, and of text that was learned from prompts.
        eviction: one of `eviction.EVICTION`.
    """

    capacity_bytes: int | None = None
    ttl_s: float | None = None
    conversations_ttl_s: float | None = 7.0 * DAY_S
    eviction: str = "lru"

    def ttl_of(self, namespace: str) -> float | None:
        """What was not used for so long is deleted."""
        return self.conversations_ttl_s if is_incidental(namespace) else self.ttl_s

    def interval_of(self, namespace: str) -> float:
        """So often a use is recorded."""
        ttl_s = self.ttl_of(namespace)
        return INTERVAL_S if ttl_s is None else min(INTERVAL_S, ttl_s / 4)


@dataclass(frozen=True)
class Evicted:
    """What was deleted to make room, and what had expired."""

    objects: int = 0
    size_bytes: int = 0

    def __add__(self, other: Evicted) -> Evicted:
        return Evicted(self.objects + other.objects, self.size_bytes + other.size_bytes)


@dataclass(frozen=True)
class _Stored:
    """The objects of one scope, with when they were last used and what they stand behind; see `chained`."""

    scope: KVScope
    records: Records
    live: Live
    used_s: np.ndarray
    depth: np.ndarray

    @classmethod
    def of(cls, scope: KVScope, records: Records) -> _Stored:
        found = records.live()
        if is_chats(scope.namespace):
            return cls(scope, records, found, *chained(records, found))
        return cls(scope, records, found, found.used_s, np.zeros(len(found.used_s), np.int64))

    def evictable(self) -> np.ndarray:
        """Bool: neither pinned, nor the preamble of something that is stored."""
        pinned = np.isin(self.live.chunk, self.live.held_chunk[self.live.owner == np.uint64(PINNED)])
        if is_chats(self.scope.namespace):
            return ~pinned
        of_preamble = [number for number, form in enumerate(self.live.forms) if form == PREAMBLE]
        in_use = {preamble_of(self.live.forms[form]) for form in np.unique(self.live.form).tolist()}
        digests = np.array([int(digest.partition(".")[0], 16) for digest in in_use], np.uint64)
        preambles = np.isin(self.live.form, of_preamble) & np.isin(self.live.key_high[self.live.chunk], digests)
        return ~(pinned | preambles)


class Room:
    """A namespace and its conversations, of all models, in one store. What several processes evict is as good as what
    one does; two that write at once go over the limit by no more than what they write in that moment.

    Args:
        namespace: of chunks.

    Attributes:
        evicted: by this object, since it was last taken.
    """

    def __init__(self, store: Store, namespace: str, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self.namespace = namespace
        self.limits = limits
        self.evicted = Evicted()
        self._store = store
        self._clock = clock
        self._records: weakref.WeakValueDictionary[KVScope, Records] = weakref.WeakValueDictionary()
        self._kept: dict[KVScope, Records] = {}
        self._looked_at = self._expired_at = -_EXPIRE_S
        self._said = False
        self._lock = threading.RLock()
        self._opening = threading.Lock()  # who opens a scope does not wait for what is deleted
        self._counting = threading.Lock()

    def records(self, scope: KVScope) -> Records:
        """Those of a scope of the namespace, shared by all who use it. They stay open where all of them count towards a
        limit; else each tenant's would, whoever comes by."""
        with self._opening:
            found = self._records.get(scope)
            if found is None:
                found = self._records[scope] = Records.of(self._store, scope)
            if self.limits.capacity_bytes is not None:
                self._kept[scope] = found
            return found

    def _all(self) -> dict[KVScope, Records]:
        """Those that are open."""
        with self._opening:
            return dict(self._records)

    @property
    def size_bytes(self) -> int:
        """Of all objects, as last followed."""
        return sum(records.size_bytes for records in self._all().values())

    @property
    def _chunks_bytes(self) -> int:
        """Of all that somebody asked for to be stored."""
        return sum(own.size_bytes for scope, own in self._all().items() if not is_incidental(scope.namespace))

    def make(self, scope: KVScope, size_bytes: int) -> bool:
        """Have so many bytes fit, which are then written at once. A conversation or learned text has none evicted but
        such: False where that is not enough, and it is not to be stored.

        Raises:
            StoreError: there is no room for a chunk, since the limit is too small for it, or for what is pinned.
        """
        with self._lock:
            if time.monotonic() - self._expired_at > _EXPIRE_S:
                self._expired_at = time.monotonic()
                for ttl_s in {self.limits.ttl_s, self.limits.conversations_ttl_s} - {None}:
                    Calendar(self._store, self.namespace, ttl_s or 0.0).mark(int(self._clock()))
                self.expire()
            limit = self.limits.capacity_bytes
            if limit is None:
                self._kept.clear()
                return True
            self._follow(scope)
            wanted = size_bytes + min(size_bytes, limit // 50)  # as much again, which another process may be writing
            if self.size_bytes + wanted <= limit:
                return True
            target, incidental = max(0, int(_LOW * limit) - wanted), is_incidental(scope.namespace)
            if incidental and self._chunks_bytes > target:
                target = limit - wanted  # no more than has to be: chunks stay, and so nearly all others would go
                if self._chunks_bytes > target:
                    return False
            self._evict(target, only_incidental=incidental)
            if self.size_bytes + size_bytes <= limit:
                return True
            if incidental:
                return False
            raise StoreError(
                f"The limit of {limit} bytes leaves no room for {size_bytes} more: give a larger capacity, or unpin "
                "what is not needed."
            )

    def expire(self, *, by_clock: bool = False) -> Evicted:
        """Delete what was not used for longer than it is to be kept; returns that.

        Args:
            by_clock: how long is what the clock says; else the `Calendar`, so that a clock that is set wrong does not
                delete everything.

        Raises:
            StoreError: the store cannot be read or written to.
        """
        with self._lock:
            self.look()
            batches = (
                self._delete(stored, some)
                for stored, old in self.expired(by_clock=by_clock)
                for some in _batches(old, stored.live.size_bytes[old], 0)
            )
            return sum(batches, Evicted())

    def expired(self, *, by_clock: bool = False) -> Iterator[tuple[_Stored, np.ndarray]]:
        """What `expire` deletes, as last looked at: of each scope the numbers of objects."""
        now = int(self._clock())
        for scope, records in self._all().items():
            ttl_s = self.limits.ttl_of(scope.namespace)
            if ttl_s is None:
                continue
            stored = _Stored.of(scope, records)
            used_s = np.clip(stored.used_s, 0, now)
            age_s = now - used_s if by_clock else Calendar(self._store, self.namespace, ttl_s).ages(used_s, now)
            old = np.flatnonzero((age_s > ttl_s) & (stored.used_s != 0) & stored.evictable())
            yield stored, old[np.argsort(-stored.depth[old], kind="stable")]

    def look(self) -> None:
        """Know of all scopes of the namespace, and what is recorded in them. Raises `StoreError`."""
        with self._lock:
            self._look()
            for records in self._all().values():
                records.refresh()

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        for scope in recorded_scopes(self._store):
            if beside(scope.namespace) == self.namespace:
                self._kept[scope] = self.records(scope)

    def _follow(self, scope: KVScope) -> None:
        """Take over what was stored by others."""
        cheap = not self._store.remote and len(self._all()) <= _OFTEN  # over a network, listing is not
        if cheap or time.monotonic() - self._looked_at > _LOOK_S:
            self._look()
        own, every = self.records(scope), self._all().values()
        for records in every if len(every) <= _OFTEN else [own]:
            records.refresh()

    def _evict(self, target_bytes: int, *, only_incidental: bool) -> None:
        """Delete until no more than that is left: conversations and learned text first, then chunks."""
        if not self._said:
            self._said = True
            _log.warning(
                "The limit of %d bytes is reached in the namespace %s: what is worth least is deleted (%s). "
                "A larger capacity keeps it.",
                self.limits.capacity_bytes,
                self.namespace,
                self.limits.eviction,
            )
        self.look()
        for incidental in (True,) if only_incidental else (True, False):
            some = {scope: own for scope, own in self._all().items() if is_incidental(scope.namespace) == incidental}
            self._evict_of([_Stored.of(scope, records) for scope, records in some.items()], target_bytes)

    def _evict_of(self, several: Sequence[_Stored], target_bytes: int) -> None:
        numbers = [np.flatnonzero(stored.evictable()) for stored in several]
        places = np.repeat(np.arange(len(several)), [len(own) for own in numbers])
        if not len(places):
            return

        def column(of: Callable[[_Stored], np.ndarray]) -> np.ndarray:
            return np.concatenate([of(stored)[own] for stored, own in zip(several, numbers, strict=True)])

        sizes, numbered = column(lambda stored: stored.live.size_bytes), np.concatenate(numbers)
        age_s = np.maximum(0, int(self._clock()) - column(lambda stored: stored.used_s))
        candidates = Candidates(column(lambda stored: stored.live.tokens[stored.live.chunk]), sizes, age_s)
        policy = EVICTION["lru" if is_incidental(several[0].scope.namespace) else self.limits.eviction]
        order = np.lexsort((-column(lambda stored: stored.depth), policy(candidates)))
        for some in _batches(order, sizes[order], int(_AT_ONCE * (self.limits.capacity_bytes or 0))):
            if self.size_bytes <= target_bytes:
                return
            for place in np.unique(places[some]).tolist():
                self._delete(several[place], numbered[some[places[some] == place]])

    def _delete(self, stored: _Stored, numbers: np.ndarray) -> Evicted:
        """Record that objects are gone, but those that were pinned meanwhile, and delete them; returns which."""
        found, records = stored.live, stored.records
        objects = [(found.key(int(found.chunk[number])), found.forms[found.form[number]]) for number in numbers]
        gone = records.drop(objects, int(self._clock()), unless=lambda key: PINNED in records.owners(key))
        self._store.delete(object_name(stored.scope, row.key, row.form) for row in gone)
        evicted = Evicted(len(gone), sum(row.size_bytes for row in gone))
        with self._counting:
            self.evicted += evicted
        return evicted

    def take_evicted(self) -> Evicted:
        """What was evicted since the last call."""
        with self._counting:
            taken, self.evicted = self.evicted, Evicted()
        return taken


class Rooms:
    """The rooms of one store, one for each namespace of chunks and its conversations."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self._rooms: dict[str, Room] = {}
        self._lock = threading.Lock()

    def of(self, namespace: str) -> Room:
        """The room of a namespace, also of one of conversations."""
        with self._lock:
            root = beside(namespace)
            if root not in self._rooms:
                self._rooms[root] = Room(self._store, root, self._limits)
            return self._rooms[root]

    def take_evicted(self) -> Evicted:
        """What was evicted since the last call."""
        with self._lock:
            rooms = list(self._rooms.values())
        return sum((room.take_evicted() for room in rooms), Evicted())


def _batches(numbers: np.ndarray, sizes: np.ndarray, least_bytes: int) -> Iterator[np.ndarray]:
    """In order, so many at a time that they have that many bytes; 256 at most."""
    start, total = 0, 0
    for end, size in enumerate(sizes.tolist(), start=1):
        total += size
        if end == len(numbers) or end - start == 256 or (least_bytes and total >= least_bytes):
            yield numbers[start:end]
            start, total = end, 0
