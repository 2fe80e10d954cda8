"""Chunk KV in a store: variants of chunks, by the chunks' tokens."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import (
    NO_CONTEXT,
    ChunkKV,
    KVScope,
    KVShape,
    StoredForm,
    base_of,
    form_of,
    key_of,
    variant_in,
)
from lmcache_rag.codec import CODECS, LOSSLESS_CODEC, BaseObject
from lmcache_rag.errors import CorruptObjectError, StoreError
from lmcache_rag.library.coding import coded
from lmcache_rag.library.forms import base_for, read_for, readable
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.names import is_incidental, object_name, parsed
from lmcache_rag.library.reading import read_if_usable
from lmcache_rag.library.room import PINNED, PREAMBLE, Rooms
from lmcache_rag.library.uses import INTERVAL_S, Uses
from lmcache_rag.records.part import OwnerRow, VariantRow
from lmcache_rag.records.records import Records, owner_number

if TYPE_CHECKING:
    from torch import Tensor

    from lmcache_rag.library.tables import ModelCodecs

_KEPT_NAMESPACES = 256


class ChunkStore:
    """The chunks of one scope (namespace and model) in a store: what is recorded of them, and their objects.

    Looking up asks the records only, as they were at the last `refresh`.

    Args:
        codec: in which KV is written and preferred; one of `codec.CODECS`.
        extra: further codecs in which chunks are written.
        codecs: of the model; without, KV can be listed and named, but not read or written.
        rooms: keep namespaces within their limits; without, there are none.
    """

    def __init__(
        self,
        store: Store,
        scope: KVScope,
        codec: str,
        codecs: ModelCodecs | None = None,
        extra: Sequence[str] = (),
        rooms: Rooms | None = None,
    ) -> None:
        self.store = store
        self.scope = scope
        self.codec = codec
        self._room = None if rooms is None else rooms.of(scope.namespace)
        self.records = Records.of(store, scope) if self._room is None else self._room.records(scope)
        interval_s = INTERVAL_S if self._room is None else self._room.limits.interval_of(scope.namespace)
        self.uses = Uses(self.records, interval_s)
        self._written = tuple(dict.fromkeys((codec, *extra)))
        self._codecs = codecs

    def refresh(self) -> None:
        """Take over what others have stored and deleted since. Raises `StoreError`."""
        self.records.refresh()

    def follow(self) -> None:
        """As `refresh`, but without waiting for a network: what others stored a moment ago may still be missing.

        Raises:
            StoreError: the store cannot be read, and no cache is in front of it.
        """
        try:
            self.records.follow(patient=is_incidental(self.scope.namespace))  # each tenant has some
        except StoreError:
            if not getattr(self.store, "caches", ()):
                raise

    def name(self, token_ids: Sequence[int] | np.ndarray, variant: str) -> str:
        """Where the variant of a chunk is kept, or would be, whole."""
        key = key_of(token_ids)
        row = readable(self.records.variants(key)).get(variant, {}).get(self.codec)
        return self._name(key, form_of(variant, self.codec) if row is None else row.form)

    def names_for(self, name: str) -> list[str]:
        """All objects that are read for one: itself, and what it is a residual against."""
        key, form, _ = parsed(name)
        return [self._name(key, each) for each in read_for(form)]

    def missing(self, token_ids: Sequence[int] | np.ndarray, variant: str) -> list[str]:
        """The codecs in which the variant of a chunk is to be written and is not; asks the store too."""
        return self.missing_of(key_of(token_ids), variant)

    def missing_of(self, key: bytes, variant: str) -> list[str]:
        """The same, from the chunk's key."""
        forms = readable(self.records.variants(key)).get(variant, {})
        return [codec for codec in self._written if codec not in forms or not self._is_there(key, forms[codec].form)]

    def preamble(self, token_ids: Sequence[int] | np.ndarray) -> StoredForm | None:
        """A preamble's object; None where there is none."""
        if not len(token_ids):
            return None
        key = key_of(token_ids)
        row = self.records.variants(key).get(PREAMBLE)
        return None if row is None else StoredForm(self._name(key, PREAMBLE), row.size_bytes)

    def preamble_named(self, digest: str) -> np.ndarray | None:
        """The tokens of the stored preamble that a variant's name calls so; None where it is not known."""
        for key in self.records.keys_beginning(bytes.fromhex(digest)):
            if PREAMBLE in self.records.variants(key):
                return self.records.tokens(key)
        return None

    def lacks_preamble(self, token_ids: Sequence[int] | np.ndarray) -> bool:
        """Whether a preamble is to be stored; asks the store too."""
        key = key_of(token_ids)
        recorded = PREAMBLE in self.records.variants(key)
        return bool(len(token_ids)) and not (recorded and self._is_there(key, PREAMBLE))

    def variants(self, key: bytes, recorded: Mapping[str, VariantRow] | None = None) -> dict[str, StoredForm]:
        """The readable variants of a chunk. Of the several objects of a variant it is the one in the codec that is
        written here, else the one of highest fidelity.

        Args:
            recorded: what the records say of the chunk, where it is known.
        """
        found = readable(self.records.variants(key) if recorded is None else recorded)
        rows = {variant: forms[min(forms, key=self._preference)] for variant, forms in found.items()}
        return {
            variant: StoredForm(self._name(key, row.form), row.size_bytes, row.used_s) for variant, row in rows.items()
        }

    def forms(self, name: str) -> list[StoredForm]:
        """All forms of the variant that this object is of, by falling fidelity."""
        key, form, _ = parsed(name)
        forms = readable(self.records.variants(key)).get(variant_in(form), {})
        rows = (forms[codec] for codec in CODECS if codec in forms)
        return [StoredForm(self._name(key, row.form), row.size_bytes) for row in rows]

    def save_preamble(self, preamble: ChunkKV) -> int:
        """Store a preamble; returns its size in bytes. Raises `StoreError`."""
        return self._save(preamble, NO_CONTEXT, [LOSSLESS_CODEC])

    def save(self, chunk: ChunkKV, variant: str) -> int:
        """Store one variant of a chunk where it is missing; returns the bytes written, none where a conversation finds
        no room. Raises `StoreError`."""
        self.refresh()
        return self._save(chunk, variant, self.missing(chunk.token_ids, variant))

    def own(self, owner: str, keys: Iterable[bytes]) -> None:
        """Chunks are not deleted while somebody owns them. Raises `StoreError`."""
        self.refresh()
        number = owner_number(owner)
        new = [key for key in dict.fromkeys(keys) if number not in self.records.owners(key)]
        if new:
            self.records.add({}, owners=[OwnerRow(key, number, held=True) for key in new])

    def owned(self, owner: str) -> list[bytes]:
        """The chunks that somebody owns."""
        return self.records.keys_of(owner_number(owner))

    def state(self, owner: str) -> str:
        """Digest of which chunks that somebody owns are stored: another one where one comes or goes, and the same
        whatever is used meanwhile; empty where none is. Walks all that is known."""
        live = self.records.live()
        held = live.held_chunk[live.owner == np.uint64(owner_number(owner))]
        stored = np.intersect1d(live.chunk, held)
        if not len(stored):
            return ""
        keys = np.stack([live.key_high[stored], live.key_low[stored]])
        return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()

    def release(self, owner: str, keys: Iterable[bytes]) -> None:
        """Own chunks no longer; those that nobody owns any more are deleted. Raises `StoreError`."""
        number, keys = owner_number(owner), list(dict.fromkeys(keys))
        if keys:
            self.records.add({}, owners=[OwnerRow(key, number, held=False) for key in keys])
            objects = [(key, form) for key in keys for form in self.records.variants(key)]
            self._drop(objects, unless=lambda key: bool(self.records.owners(key)))

    def pin(self, keys: Iterable[bytes]) -> None:
        """Chunks are not evicted, nor do they expire, while they are pinned. Raises `StoreError`."""
        self.refresh()
        self.records.add({}, owners=[OwnerRow(key, PINNED, held=True) for key in dict.fromkeys(keys)])

    def unpin(self, keys: Iterable[bytes]) -> None:
        """They may be evicted again; nothing is deleted now. Raises `StoreError`."""
        self.refresh()
        self.records.add({}, owners=[OwnerRow(key, PINNED, held=False) for key in dict.fromkeys(keys)])

    def delete(self, keys: Iterable[bytes], variant: str | None = None) -> None:
        """Delete chunks, whoever owns them, or only one variant of each, with what is of no use without it. Raises
        `StoreError`."""
        self.refresh()
        keys = list(keys)
        gone = [
            (key, form)
            for key in keys
            for form in self.records.variants(key)
            if variant is None or variant in map(variant_in, read_for(form))
        ]
        owned = [
            OwnerRow(key, owner, held=False) for key in keys if variant is None for owner in self.records.owners(key)
        ]
        if gone or owned:
            self.records.add({}, [VariantRow(key, form, 0, _now()) for key, form in gone], owned)
            self.store.delete(self._name(key, form) for key, form in gone)

    def _drop(self, objects: Sequence[tuple[bytes, str]], unless: Callable[[bytes], bool]) -> None:
        gone = self.records.drop(objects, _now(), unless)
        self.store.delete(self._name(row.key, row.form) for row in gone)

    def clear(self) -> None:
        """Delete all chunks. Raises `StoreError`."""
        self.refresh()
        self.delete(list(self.records.keys()))

    def load(self, name: str, shape: KVShape, part: range | None = None) -> LoadedKV | str:
        """The object `name`, or why it cannot be used. What is absent or corrupt is recorded no longer, and deleted, so
        that it is computed again.

        Args:
            part: which of the chunk's tokens are wanted; without, all are read.
        """
        key, form, _ = parsed(name)
        base = base_of(form)
        if base_of(base):
            return "of an unknown codec"  # nobody stores a residual against another one
        if base:
            loaded = self._load_residual(name, self._name(key, base), shape, part)
        else:
            loaded = self._load(self.store, name, shape, part)
            if loaded in _DAMAGED and (origin := self.store.heal(name)) is not None:
                loaded = self._load(origin, name, shape, part)  # a copy in a cache costs nobody the blob itself
        if loaded in ("corrupt", "absent", _OTHER_BASE):
            self._discard(name)
        return loaded

    def _load_residual(self, name: str, base_name: str, shape: KVShape, part: range | None) -> LoadedKV | str:
        """As `load`; where the base cannot be used, it is discarded, and the residual with it."""
        base = self.load(base_name, shape, part)
        if isinstance(base, str):
            return base
        loaded = self._load(self.store, name, shape, part, base)
        if loaded in _DAMAGED and (origin := self.store.heal(name)) is not None:
            loaded = self._load(origin, name, shape, part, base)
        if loaded == _OTHER_BASE and (origin := self.store.heal(base_name)) is not None:
            base = self._load(origin, base_name, shape, part)
            loaded = base if isinstance(base, str) else self._load(origin, name, shape, part, base)
        return loaded

    def _load(
        self, store: Store, name: str, shape: KVShape, part: range | None, base: LoadedKV | None = None
    ) -> LoadedKV | str:
        read = read_if_usable(store, name, part)
        if isinstance(read, str):
            return read
        stored, size_bytes = read
        header = stored.header
        if (header.namespace, header.model) != (self.scope.namespace, self.scope.model):
            return "of another model"
        found = (header.layers, header.kv_heads, header.head_size, header.dtype)
        if found != (shape.layers, shape.kv_heads, shape.head_size, str(shape.dtype).removeprefix("torch.")):
            return "of another model"
        if header.name != name:
            return "of another chunk"
        if header.base is not None and (base is None or base.checksum != header.base.checksum):
            return _OTHER_BASE
        own = header.codec if base is None else base.codec
        if own not in CODECS:
            return "of an unknown codec"
        assert self._codecs is not None
        try:
            codec = self._codecs.for_reading(own, header.tables, residual=base is not None)
        except StoreError:
            return "coded with tables that cannot be read"
        if codec is None:
            return "coded with tables that are missing"
        self.uses.note(*parsed(name)[:2])
        return LoadedKV(stored, shape, codec, size_bytes, base)

    def _save(self, chunk: ChunkKV, variant: str, codecs: Sequence[str]) -> int:
        assert self._codecs is not None
        if not bool(chunk.kv.isfinite().all()):
            raise StoreError("The model computed KV that is no finite number: use another --dtype.")
        key = key_of(chunk.token_ids)
        written = []
        for name in codecs:
            base = self._base(chunk, variant, name)
            codec, tables = self._codecs.for_writing(name, residual=base is not None)
            written.append(coded(chunk, self.scope, variant, name, codec, tables, base))
        if not written or not self._has_room(sum(len(piece) for _, parts in written for piece in parts)):
            return 0
        recorded = self.records.variants(key)
        if any(header.base is not None and header.base.form not in recorded for header, _ in written):
            return self._save(chunk, variant, codecs)  # what made room for it was what it is against
        rows = [
            VariantRow(key, parsed(header.name)[1], self.store.write(header.name, parts), _now())
            for header, parts in written
        ]
        self.records.add({key: chunk.token_ids}, rows)
        return sum(row.size_bytes for row in rows)

    def _base(self, chunk: ChunkKV, variant: str, codec: str) -> tuple[BaseObject, Tensor] | None:
        """What a variant is stored as a residual against, and its KV; None where it is stored whole."""
        import torch

        key = key_of(chunk.token_ids)
        form = base_for(variant, codec, self.records.variants(key))
        if not form:
            return None
        layers, _, _, kv_heads, head_size = chunk.kv.shape
        shape = KVShape(layers, kv_heads, head_size, chunk.kv.dtype)
        loaded = self.load(self._name(key, form), shape)
        if isinstance(loaded, str):
            return None
        try:
            return BaseObject(form=form, checksum=loaded.checksum), loaded.kv(torch.float32)
        except CorruptObjectError:
            return None

    def _has_room(self, size_bytes: int) -> bool:
        return self._room is None or self._room.make(self.scope, size_bytes)

    def _is_there(self, key: bytes, form: str) -> bool:
        """Whether the store has all that is read for a form. Over a network the records are trusted: what turns out to
        be gone is recorded so, and is missing then."""
        return self.store.remote or all(self.store.exists(self._name(key, each)) for each in read_for(form))

    def _name(self, key: bytes, form: str) -> str:
        return object_name(self.scope, key, form)

    def _preference(self, codec: str) -> tuple[bool, int]:
        return codec != self.codec, list(CODECS).index(codec)

    def _discard(self, name: str) -> None:
        key, form, _ = parsed(name)
        try:
            self.refresh()
            if any(form in read_for(known) for known in self.records.variants(key)):
                self._drop([(key, form)], unless=lambda _key: False)
        except StoreError:
            return  # a store that may only be read; the miss is reported all the same


class ChunkStores:
    """The chunk stores of one model, one for each namespace.

    Args:
        codecs, codec, extra, rooms: see `ChunkStore`.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        codec: str,
        codecs: ModelCodecs | None = None,
        extra: Sequence[str] = (),
        rooms: Rooms | None = None,
    ) -> None:
        self._make = lambda namespace: ChunkStore(store, KVScope(namespace, model), codec, codecs, extra, rooms)
        self._kept: OrderedDict[str, ChunkStore] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, namespace: str) -> ChunkStore:
        """The chunks of a namespace. Of many namespaces, those used last stay open."""
        with self._lock:
            if namespace not in self._kept:
                self._kept[namespace] = self._make(namespace)
            self._kept.move_to_end(namespace)
            if len(self._kept) > _KEPT_NAMESPACES:
                self._kept.popitem(last=False)
            return self._kept[namespace]

    def load(self, name: str, shape: KVShape, part: range | None = None) -> LoadedKV | str:
        """See `ChunkStore.load`; of the namespace that the name says."""
        return self.of(name.partition("/")[0]).load(name, shape, part)

    def flush(self) -> None:
        """Record the uses that wait to be."""
        with self._lock:
            kept = list(self._kept.values())
        for chunks in kept:
            chunks.uses.flush()


_OTHER_BASE = "a residual against another object"
_DAMAGED = ("corrupt", "of another chunk", "of another model", _OTHER_BASE)


def _now() -> int:
    return int(time.time())
