"""Chunk KV in a store: variants of chunks, by the chunks' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import NO_CONTEXT, ChunkKV, KVScope, KVShape, StoredForm, chunk_key
from lmcache_rag.codec import CODECS, LOSSLESS_CODEC, Codec, ObjectHeader, StoredObject, pack, unpack
from lmcache_rag.codec.container import FORMAT_VERSION
from lmcache_rag.errors import CorruptObjectError, StoreError

if TYPE_CHECKING:
    from lmcache_rag_kernels import Rotation
    from torch import Tensor

    from lmcache_rag.library.tables import ModelCodecs


class LoadedKV:
    """One stored variant of a chunk, its layers decoded one by one."""

    def __init__(self, stored: StoredObject, shape: KVShape, codec: Codec, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._stored = stored
        self._shape = shape
        self._codec = codec

    @property
    def tokens(self) -> int:
        return self._stored.header.tokens

    @property
    def level(self) -> str:
        """At which it was stored."""
        return self._stored.header.codec

    def place(self, offset: int, rotations: Sequence[Rotation | None], start: int, key: Tensor, value: Tensor) -> None:
        """See `ChunkKV.place`. Raises `CorruptObjectError`."""
        self._codec.restore(self._stored.coded, offset, rotations, start, key, value)

    def layer(self, index: int) -> Tensor:
        """`[2, tokens, kv_heads, head_size]`: K with RoPE taken off, and V."""
        shape = self._shape
        return self._codec.decode_layer(index, self._stored.coded, shape.kv_heads, shape.head_size, shape.dtype)


def codec_of(name: str) -> str:
    """At which level the object of this name is."""
    return name.rpartition("/")[2].split(".")[1]


def _name(prefix: str, variant: str, level: str) -> str:
    return f"{prefix}{variant}.{level}.v{FORMAT_VERSION}"


def coded(
    chunk: ChunkKV, scope: KVScope, variant: str, level: str, codec: Codec, tables: str
) -> tuple[ObjectHeader, list[bytes | memoryview]]:
    """The object of a variant of a chunk: its header, and its parts, to be written one after another.

    Args:
        tables: digest of the codec's tables.
    """
    layers, _, tokens, kv_heads, head_size = chunk.kv.shape
    header = ObjectHeader(
        namespace=scope.namespace,
        model=scope.model,
        key=chunk_key(chunk.token_ids),
        variant=variant,
        codec=level,
        tables=tables,
        tokens=tokens,
        group=codec.group,
        layers=layers,
        kv_heads=kv_heads,
        head_size=head_size,
        dtype=str(chunk.kv.dtype).removeprefix("torch."),
    )
    layer_streams = [codec.encode_layer(index, layer) for index, layer in enumerate(chunk.kv)]
    return header, pack(header, chunk.token_ids, list(zip(*layer_streams, strict=True)))


class ChunkStore:
    """The chunks of one scope (namespace and model) in a store.

    Args:
        level: at which KV is written and preferred; one of `codec.CODECS`.
        extra: further levels at which chunks are written.
        codecs: of the model; without, KV can be listed and named, but not read or written.
    """

    def __init__(
        self,
        store: Store,
        scope: KVScope,
        level: str,
        codecs: ModelCodecs | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.store = store
        self.scope = scope
        self.level = level
        self._levels = tuple(dict.fromkeys((level, *extra)))
        self._codecs = codecs

    def name(self, token_ids: Sequence[int] | np.ndarray, variant: str) -> str:
        """Where the variant of a chunk is kept."""
        return _name(self.scope.chunk_prefix(token_ids), variant, self.level)

    def missing(self, token_ids: Sequence[int] | np.ndarray, variant: str) -> list[str]:
        """The levels at which the variant of a chunk is to be written and is not."""
        return self.missing_below(self.scope.chunk_prefix(token_ids), variant)

    def missing_below(self, prefix: str, variant: str) -> list[str]:
        """The same, from what the names of all variants of the chunk start with."""
        return [level for level in self._levels if not self.store.exists(_name(prefix, variant, level))]

    def preamble_name(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """Where a preamble is kept: lossless, whatever the level of chunks, since all prompts share it, what a model
        makes of its first tokens matters most, and vLLM's prefix cache may then keep it too."""
        return _name(self.scope.chunk_prefix(token_ids), NO_CONTEXT, LOSSLESS_CODEC)

    def preamble(self, token_ids: Sequence[int] | np.ndarray) -> str | None:
        """The name of a preamble's object; None where there is none."""
        name = self.preamble_name(token_ids)
        return name if len(token_ids) and self.store.exists(name) else None

    def variants(self, token_ids: Sequence[int] | np.ndarray) -> dict[str, str]:
        """The readable variants of a chunk: variant -> object name. Of a variant's several levels it is the one that
        is written here, else the one of highest fidelity."""
        found: dict[str, dict[str, str]] = {}
        for name in self.store.list(self.scope.chunk_prefix(token_ids)):
            variant, _, form = name.rpartition("/")[2].partition(".")
            level, _, version = form.rpartition(".v")
            if level in CODECS and version == str(FORMAT_VERSION):
                found.setdefault(variant, {})[level] = name
        return {variant: names[min(names, key=self._preference)] for variant, names in found.items()}

    def save_preamble(self, preamble: ChunkKV) -> int:
        """Store a preamble; returns its size in bytes. Raises `StoreError`."""
        return self._save(preamble, NO_CONTEXT, LOSSLESS_CODEC)

    def save(self, chunk: ChunkKV, variant: str) -> int:
        """Store one variant of a chunk where it is missing; returns the bytes written. Raises `StoreError`."""
        return sum(self._save(chunk, variant, level) for level in self.missing(chunk.token_ids, variant))

    def levels(self, name: str) -> list[StoredForm]:
        """All levels at which the variant of this name is stored, by falling fidelity."""
        variant = name.rpartition(".v")[0].rpartition(".")[0]
        names = (f"{variant}.{level}.v{FORMAT_VERSION}" for level in CODECS)
        sizes = ((name, self.store.size(name)) for name in names)
        return [StoredForm(name, size) for name, size in sizes if size is not None]

    def _save(self, chunk: ChunkKV, variant: str, level: str) -> int:
        assert self._codecs is not None
        if not bool(chunk.kv.isfinite().all()):
            raise StoreError("The model computed KV that is no finite number: use another --dtype.")
        codec, tables = self._codecs.for_writing(level)
        header, parts = coded(chunk, self.scope, variant, level, codec, tables)
        return self.store.write(header.name, parts)

    def load(self, name: str, shape: KVShape) -> LoadedKV | str:
        """The object `name`, or why it cannot be used. A corrupt object is deleted, so that it is computed again."""
        try:
            data = self.store.read(name)
        except StoreError:
            return "unreadable"
        if data is None:
            return "absent"
        try:
            stored = unpack(data)
        except CorruptObjectError:
            self._discard(name)
            return "corrupt"
        header = stored.header
        if (header.namespace, header.model) != (self.scope.namespace, self.scope.model):
            return "of another model"
        found = (header.layers, header.kv_heads, header.head_size, header.dtype)
        if found != (shape.layers, shape.kv_heads, shape.head_size, str(shape.dtype).removeprefix("torch.")):
            return "of another model"
        if header.name != name:
            return "of another chunk"
        if header.codec not in CODECS:
            return "of an unknown codec"
        assert self._codecs is not None
        try:
            codec = self._codecs.for_reading(header.codec, header.tables)
        except StoreError:
            return "coded with tables that cannot be read"
        if codec is None:
            return "coded with tables that are missing"
        return LoadedKV(stored, shape, codec, len(data))

    def _preference(self, level: str) -> tuple[bool, int]:
        return level != self.level, list(CODECS).index(level)

    def _discard(self, name: str) -> None:
        try:
            self.store.delete([name])
        except StoreError:
            return  # a store that may only be read; the miss is reported all the same
