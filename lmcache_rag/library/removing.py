"""Deleting and pinning chunks by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope
from lmcache_rag.codec import LOSSLESS_CODEC
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.records.records import Records


def matching(
    records: Records, *, owner: int | None = None, key: str | None = None, before: float | None = None
) -> list[bytes]:
    """The stored chunks that an owner holds, of a key (hex), or none of whose objects was used since `before`, in
    seconds since 1970; of which several of these hold where they are given."""
    found = records.live()
    chunks = np.unique(found.chunk)
    if owner is not None:
        chunks = np.intersect1d(chunks, found.held_chunk[found.owner == np.uint64(owner)])
    if before is not None:
        chunks = np.setdiff1d(chunks, found.chunk[found.used_s >= before])
    keys = [found.key(chunk) for chunk in chunks.tolist()]
    return keys if key is None else [each for each in keys if each.hex() == key.lower()]


def remove(store: Store, scope: KVScope, keys: Iterable[bytes]) -> int:
    """Delete chunks, whoever owns them; returns how many bytes that were. Raises `StoreError`."""
    chunks = _opened(store, scope)
    before = chunks.records.size_bytes
    chunks.delete(keys)
    return before - chunks.records.size_bytes


def known(records: Records, keys: Sequence[bytes]) -> list[bytes]:
    """Those of the chunks of which something is stored."""
    return [key for key in keys if records.variants(key)]


def pin(store: Store, scope: KVScope, keys: Sequence[bytes], *, held: bool) -> None:
    """Pin chunks, or let go of them. Raises `StoreError`."""
    if keys:
        chunks = _opened(store, scope)
        (chunks.pin if held else chunks.unpin)(keys)


def _opened(store: Store, scope: KVScope) -> ChunkStore:
    chunks = ChunkStore(store, scope, LOSSLESS_CODEC)
    chunks.refresh()
    return chunks
