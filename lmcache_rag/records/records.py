"""What is stored, in one scope of a store: a view of its log, kept up to date by reading what was written since."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from weakref import WeakValueDictionary

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope, base_of
from lmcache_rag.errors import CorruptObjectError, StoreError
from lmcache_rag.process import OwnProcess
from lmcache_rag.records.follower import Follower
from lmcache_rag.records.log import Log
from lmcache_rag.records.merge import merge
from lmcache_rag.records.part import OwnerRow, Part, VariantRow, build
from lmcache_rag.records.view import View

_GROWTH = 4
"""A part is merged with the one before it where that is not more than so many times its size."""

_QUICK = 4096
"""Following the log never merges more chunks than these at a time."""

_SEGMENTS = 256
_SHARE = 16
"""An epoch is ended after so many segments, or where they hold a larger share of all chunks than one in so many."""

_LOOK_S = 5.0
"""So often it is looked whether the epoch is still there: a reader may have slept through two of them."""

_log = logging.getLogger(__name__)


def owner_number(owner: str) -> int:
    """What an owner is called in the records."""
    return int.from_bytes(hashlib.blake2b(owner.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class Records(View):
    """Chunks by key (16 bytes), with their tokens, stored objects and owners.

    Nothing is read before the first `refresh`, `follow` or `add`; looking up reads memory only, and mapped files. Used
    by several threads at once.
    """

    def __init__(self, store: Store, scope: KVScope) -> None:
        self._log = Log(store, f".records/{scope.prefix}")
        self._lock = threading.RLock()
        self._compacting = threading.Lock()
        self._epoch = 0
        self._number = 0
        self._names: list[str] = []  # of the base's parts
        self._base: list[Part] = []
        self._frozen: list[Part] = []  # under way to become one of the base's
        self._fresh: list[Part] = []
        self._looked_at = 0.0
        self._lost = False  # whether something that was recorded cannot be read
        self._size_bytes: int | None = None  # of all objects; None where it is to be counted
        self._remote = store.remote
        self._process = OwnProcess("A view of a store's records", StoreError)
        self._following = threading.Lock()
        self._follower: Follower | None = None

    @classmethod
    def of(cls, store: Store, scope: KVScope) -> Records:
        """Those of a scope. Over a network all who have the same store in this process share one view, so that each
        knows at once what another wrote."""
        if not store.remote:
            return cls(store, scope)
        with _opening:
            # A view keeps its store, so that no other one has its id while the view is there.
            return _open.setdefault((id(store), scope), cls(store, scope))

    @property
    def position(self) -> tuple[int, int]:
        """Changes with what is recorded."""
        return self._epoch, self._number

    def refresh(self) -> None:
        """Take over what was written since; writes nothing. Raises `StoreError` where the store cannot be read."""
        self._process.check()
        with self._lock:
            if time.monotonic() - self._looked_at > _LOOK_S or not self._epoch:
                self._look(self._number)
            self._follow()

    def follow(self, *, patient: bool = False) -> None:
        """As `refresh`, but over a network, which may take long: there a thread takes over what was written, several
        times a second while this is called now and then, and this waits for nothing.

        Args:
            patient: whether the thread looks less often while this is not called.

        Raises:
            StoreError: the store could not be read lately.
        """
        if not self._remote:
            self.refresh()
            return
        self._process.check()
        with self._following:
            if self._follower is None:
                self._follower = Follower(self.refresh, patient=patient)
        self._follower.look()

    @property
    def is_whole(self) -> bool:
        """Whether all that was recorded could be read, and anything was. Raises `StoreError`."""
        with self._lock:
            return not self._lost and bool(self._log.epochs())

    @property
    def size_bytes(self) -> int:
        """Of all stored objects together, as of the last `refresh`. Counted once, and then kept up to date."""
        with self._lock:
            if self._size_bytes is None:
                self._size_bytes = int(self.live().size_bytes.sum())
            return self._size_bytes

    def add(
        self,
        tokens: Mapping[bytes, np.ndarray],
        variants: Iterable[VariantRow] = (),
        owners: Iterable[OwnerRow] = (),
    ) -> None:
        """Record facts, all of them or none. Objects are stored before they are recorded, and deleted after.

        Args:
            tokens: of all chunks of which objects are recorded.

        Raises:
            StoreError: the store cannot be written to.
        """
        self._process.check()
        variants, owners = list(variants), list(owners)

        def part() -> Part:
            new = {key: ids for key, ids in tokens.items() if self.tokens(key) is None or not self.variants(key)}
            return build(new, variants, owners)

        self._write(part)

    def use(self, uses: Mapping[tuple[bytes, str], int]) -> None:
        """Record when objects were used. Those that are gone by then, whoever deleted them, stay so.

        Args:
            uses: seconds since 1970, by key and form.

        Raises:
            StoreError: the store cannot be written to.
        """

        def part() -> Part:
            known = {key: self.variants(key) for key, _ in uses}
            rows = [(known[key].get(form), used_s) for (key, form), used_s in uses.items()]
            return build({}, [replace(row, used_s=used_s) for row, used_s in rows if row is not None])

        self._write(part)

    def drop(
        self, objects: Iterable[tuple[bytes, str]], used_s: int, unless: Callable[[bytes], bool] = lambda _key: False
    ) -> list[VariantRow]:
        """Record that objects, named by key and form, are gone, and with them the residuals against them, which are of
        no use alone; returns what they were, so that they can be deleted.

        Args:
            used_s: now, in seconds since 1970.
            unless: of which chunks nothing is to go, asked when all that others wrote before is known.

        Raises:
            StoreError: the store cannot be written to.
        """
        forms, gone = dict[bytes, set[str]](), dict[tuple[bytes, str], VariantRow]()
        for key, form in objects:
            forms.setdefault(key, set()).add(form)

        def part() -> Part:
            rows = [
                row
                for key, own in forms.items()
                for row in self.variants(key).values()
                if not own.isdisjoint((row.form, base_of(row.form))) and not unless(key)
            ]
            gone.update(((row.key, row.form), row) for row in rows)
            return build({}, [replace(row, size_bytes=0, used_s=used_s) for row in rows])

        self._write(part)
        return [row for name, row in gone.items() if name[1] not in self.variants(name[0])]

    def _write(self, made: Callable[[], Part]) -> None:
        """Write a segment.

        Args:
            made: what to write, from all that was written before it: it is made anew where another writer was faster.
        """
        with self._lock:
            while True:
                self.refresh()
                self._follow(begin=True)
                epoch, part = self._epoch, made()
                if not len(part):
                    return
                if not self._log.write_segment(epoch, self._number + 1, part.to_bytes()):
                    continue
                self._number += 1
                self._take(part)
                if (epoch, self._number) == (1, 1):
                    self._log.point(epoch)
                # Where an epoch long ended was written to, nobody will see it there.
                self._look(self._number - 1)
                if self._epoch == epoch or self._has(part):
                    break
            due = self._is_due()
        if due and not self._compacting.locked():
            threading.Thread(target=self._compact_quietly, name="lmcache-rag-records", daemon=True).start()

    def compact(self) -> None:
        """Merge what was written one by one into large parts, from which the records are opened at once.

        Raises:
            StoreError: the store cannot be written to.
        """
        with self._compacting:
            self.refresh()
            with self._lock:
                self._follow(begin=True)
                epoch, names, base = self._epoch, self._names, self._base
                self._frozen, self._fresh = self._fresh, []
                frozen = self._frozen
            try:
                kept, size = len(base), sum(map(len, frozen))
                while kept and len(base[kept - 1]) <= _GROWTH * size:
                    kept -= 1
                    size += len(base[kept])
                # Read whole: what has rotted would be merged into what is then taken to be right.
                whole = [part for name in names[kept:] if (part := self._mapped(name, mapped=False)) is not None]
                parts = [*whole, *frozen]
                merged = merge(parts, whole=not kept) if parts else None
                new = [] if merged is None else [self._log.write_part(epoch, merged.to_bytes())]
                self._end_epoch(epoch, [*names[:kept], *new])
            finally:
                with self._lock:
                    if self._epoch == epoch:
                        self._fresh = [*self._frozen, *self._fresh]
                        self._frozen = []
                        self._show()

    def restart(self, parts: Iterable[Part]) -> None:
        """Forget all that is recorded, and record this instead. Raises `StoreError`."""
        with self._lock:
            whole = merge(list(parts), whole=True).to_bytes()
            epoch = max([1, *self._log.epochs()])  # the first one begins with nothing, and somebody may be there
            # It is ended before the next one is begun: else whoever dies in between leaves a base that others, who go
            # on writing here, would take for the one that follows what they wrote.
            self._log.end(epoch)
            while not self._log.begin(epoch + 1, [self._log.write_part(epoch, whole)]):
                epoch += 1  # another writer has begun it meanwhile
                self._log.end(epoch)
            self._log.point(epoch + 1)
            self._enter(epoch + 1)
            self._lost, self._size_bytes = False, None

    def _has(self, part: Part) -> bool:
        """Whether what was just written has been taken over into the epoch that followed."""
        for row in range(len(part)):
            key = part.key(row)
            known = self.variants(key)
            if any(bool(variant.size_bytes) != (variant.form in known) for variant in part.variants_of(row)):
                return False
            if any(row.held != (row.owner in self.owners(key)) for row in part.owners_of(row)):
                return False
        return True

    def _look(self, number: int) -> None:
        """Go to the newest epoch, where this is not the one.

        Epochs are listed only where the hint is missing or leads nowhere. One that is older than it could be leads on,
        by what ends each epoch.

        Args:
            number: segment of this epoch that was there, 0 for its base; while it is, the epoch has not been forgotten.
        """
        self._looked_at = time.monotonic()
        latest = self._log.latest()
        if latest is not None:
            if self._epoch and latest <= self._epoch and self._log.holds(self._epoch, number):
                return
            if latest > self._epoch and self._log.holds(latest, int(latest == 1)) and self._goes_to(latest):
                return
        epochs = self._log.epochs()
        if self._epoch and epochs and epochs[-1] <= self._epoch and self._log.holds(self._epoch, number):
            return
        self._go_to_newest(epochs)

    def _go_to_newest(self, epochs: list[int]) -> None:
        """Enter the newest of these that is whole; a first one where there is none."""
        for epoch in reversed(epochs):
            if self._goes_to(epoch):
                return
        self._epoch, self._number = 1, 0
        self._names, self._base, self._frozen, self._fresh = [], [], [], []
        self._show()

    def _goes_to(self, epoch: int) -> bool:
        """Enter an epoch and follow it; False where its base is damaged."""
        self._size_bytes = None
        try:
            self._enter(epoch)
        except CorruptObjectError as error:
            self._lost = True
            _log.warning("epoch %d of the records is passed over (%s)", epoch, error)
            return False
        self._follow()
        return True

    def _follow(self, *, begin: bool = False) -> None:
        """Take over the segments that follow.

        Args:
            begin: whether an epoch is begun where whoever ended the last one has not begun it, or not yet. Who only
                reads knows all there is without it, and must not be kept from reading by writing.
        """
        while (content := self._log.segment(self._epoch, self._number + 1)) is not None:
            if not len(content):
                if not self._go_on(begin=begin):
                    return
                continue
            try:
                self._take(Part.from_bytes(content))
            except CorruptObjectError as error:
                self._lost = True
                _log.warning("segment %d.%d of the records is lost (%s)", self._epoch, self._number + 1, error)
            self._number += 1

    def _take(self, part: Part) -> None:
        if self._size_bytes is not None:
            self._size_bytes += self._growth(part)
        self._fresh.append(part)
        while len(self._fresh) > 1 and len(self._fresh[-2]) <= min(_GROWTH * len(self._fresh[-1]), _QUICK):
            self._fresh[-2:] = [merge(self._fresh[-2:], whole=False)]
        self._show()

    def _growth(self, part: Part) -> int:
        """By how many bytes there is more stored when a part is taken over."""
        growth = 0
        for row in range(len(part)):
            said = {variant.form: variant.size_bytes for variant in part.variants_of(row)}
            known = self.variants(part.key(row)) if said else {}
            growth += sum(said.values()) - sum(known[form].size_bytes for form in said.keys() & known.keys())
        return growth

    def _show(self) -> None:
        self.parts = (*self._base, *self._frozen, *self._fresh)

    def _go_on(self, *, begin: bool) -> bool:
        """Enter the next epoch; False where nobody has begun it."""
        try:
            begun, damaged = self._log.base(self._epoch + 1) is not None, False
        except CorruptObjectError:
            begun, damaged = False, True
        if not begun and not begin:
            return False
        if begun or self._begin(self._epoch + 1, self._names, [*self._frozen, *self._fresh], replace=damaged):
            self._enter(self._epoch + 1)
        return True

    def _end_epoch(self, epoch: int, names: list[str]) -> None:
        """End the epoch, and begin the next one with these parts and what came after them."""
        with self._lock:
            while self._epoch == epoch and not self._log.write_segment(epoch, self._number + 1, [b""]):
                self._follow(begin=True)
            if self._epoch == epoch and self._begin(epoch + 1, names, self._fresh):
                self._enter(epoch + 1)
                self._log.forget(epoch + 1)

    def _begin(self, epoch: int, names: list[str], rest: list[Part], *, replace: bool = False) -> bool:
        """Begin an epoch with these parts, where nobody has. False where that was long ago, and it has been forgotten
        since: then the newest epoch is entered."""
        if rest:
            names = [*names, self._log.write_part(epoch - 1, merge(rest, whole=not names).to_bytes())]
        self._log.begin(epoch, names, replace=replace)
        epochs = self._log.epochs()
        if epochs[-1] > epoch:
            self._go_to_newest(epochs)
            return False
        self._log.point(epoch)
        return True

    def _enter(self, epoch: int) -> None:
        """Be where an epoch begins. Raises `CorruptObjectError`, also where it has no base, since who was to begin it
        died and left a folder. Only the first one begins with nothing."""
        names = self._log.base(epoch)
        if names is None and epoch > 1:
            raise CorruptObjectError("it was not begun")
        known = dict(zip(self._names, self._base, strict=True))
        found = {name: known.get(name) or self._mapped(name) for name in names or ()}
        base = {name: part for name, part in found.items() if part is not None}
        if len(base) < len(found):
            self._size_bytes = None
        self._base, self._names = list(base.values()), list(base)
        self._epoch, self._number, self._frozen, self._fresh = epoch, 0, [], []
        self._show()

    def _mapped(self, name: str, *, mapped: bool = True) -> Part | None:
        """A part of the base; see `Part.from_bytes`. None where it is lost."""
        try:
            try:
                return Part.from_bytes(self._log.map_part(name) or memoryview(b""), mapped=mapped)
            except CorruptObjectError:
                return Part.from_bytes(self._log.healed_part(name) or memoryview(b""), mapped=mapped)
        except CorruptObjectError as error:
            self._lost = True
            _log.warning("part %s of the records is lost (%s): run `lmcache-rag store rebuild`", name, error)
            return None

    def _is_due(self) -> bool:
        fresh, base = (sum(map(len, parts)) for parts in (self._fresh, self._base))
        return self._number >= _SEGMENTS or fresh > max(_QUICK, base // _SHARE)

    def _compact_quietly(self) -> None:
        try:
            self.compact()
        except StoreError as error:
            _log.warning("the records could not be compacted (%s)", error)


_open: WeakValueDictionary[tuple[int, KVScope], Records] = WeakValueDictionary()
_opening = threading.Lock()


def _forget_lock() -> None:
    """Another thread may have held the lock when this process was forked."""
    global _opening  # noqa: PLW0603
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
