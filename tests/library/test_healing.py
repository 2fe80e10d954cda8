"""Damage in a cache costs nobody the blob itself; damage where everything is kept is a miss, and is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache_rag.blobs.base import Store
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.tiers import Cache, TieredStore
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape, key_of
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.tables import TableStore
from lmcache_rag.records.records import Records
from tests.helpers import chunk_store
from tests.library.test_tables import tables
from tests.records.test_records import known, save

SCOPE = KVScope("default", "f" * 32)
SHAPE = KVShape(layers=2, kv_heads=1, head_size=64, dtype=torch.float32)
TOKENS = np.arange(200, dtype=np.int32)
VARIANT = "a" * 16


@pytest.fixture
def store(tmp_path: Path) -> TieredStore:
    return TieredStore([Cache("disk", DiskStore(tmp_path / "cache"))], DiskStore(tmp_path / "origin"))


@pytest.fixture
def kv() -> torch.Tensor:
    return torch.randn(2, 2, 200, 1, 64)


@pytest.fixture
def chunks(store: TieredStore, kv: torch.Tensor) -> ChunkStore:
    chunks = chunk_store(store, SCOPE, SHAPE)
    chunks.save(ChunkKV(TOKENS, kv), VARIANT)
    return chunks


def damage(store: Store, name: str, how: str) -> None:
    data = bytearray(store.read(name) or b"")
    assert data
    if how == "flipped":
        data[-1] ^= 1
    elif how == "cut":
        del data[100:]
    else:
        data = bytearray(store.read(how) or b"")
    store.write(name, [data])


@pytest.mark.parametrize("part", [None, range(190, 200)], ids=["whole", "part"])
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_copy_in_a_cache(
    chunks: ChunkStore, store: TieredStore, kv: torch.Tensor, how: str, part: range | None
) -> None:
    name = chunks.name(TOKENS, VARIANT)
    damage(store.caches[0].store, name, how)
    loaded = chunks.load(name, SHAPE, part)
    assert isinstance(loaded, LoadedKV)
    assert torch.equal(loaded.kv(), kv if part is None else kv[:, :, 128:]) or part is not None
    assert store.origin.exists(name) and not store.caches[0].store.exists(name)
    assert set(chunks.variants(key_of(TOKENS))) == {VARIANT} and store.stats()["disk"].healed == 1
    again = chunks.load(name, SHAPE)
    assert isinstance(again, LoadedKV) and torch.equal(again.kv(), kv)
    store.flush()
    assert store.caches[0].store.exists(name)


def test_a_copy_of_another_chunk_in_a_cache(chunks: ChunkStore, store: TieredStore, kv: torch.Tensor) -> None:
    chunks.save(ChunkKV(TOKENS[::-1].copy(), kv), VARIANT)
    name = chunks.name(TOKENS, VARIANT)
    damage(store.caches[0].store, name, chunks.name(TOKENS[::-1], VARIANT))
    assert isinstance(chunks.load(name, SHAPE), LoadedKV)


def test_damage_where_it_is_kept(chunks: ChunkStore, store: TieredStore) -> None:
    name = chunks.name(TOKENS, VARIANT)
    damage(store.origin, name, "flipped")
    assert isinstance(chunks.load(name, SHAPE), LoadedKV)  # from the cache, which knows nothing of it
    store.caches[0].drop([name])
    assert chunks.load(name, SHAPE) == "corrupt"
    assert not store.exists(name) and not chunks.variants(key_of(TOKENS))
    assert chunks.missing(TOKENS, VARIANT) == ["raw"]


def test_what_is_gone_where_it_is_kept_and_is_in_a_cache(chunks: ChunkStore, store: TieredStore) -> None:
    """Another machine deleted it. The records say so, and until they are read it is what it was."""
    name = chunks.name(TOKENS, VARIANT)
    other = chunk_store(DiskStore(store.origin.root), SCOPE, SHAPE)  # type: ignore[attr-defined]
    other.clear()
    assert isinstance(chunks.load(name, SHAPE), LoadedKV)
    chunks.refresh()
    assert not chunks.variants(key_of(TOKENS))


def test_damaged_tables_in_a_cache(store: TieredStore) -> None:
    expected = tables(1)
    TableStore(store, SCOPE.model).add(expected)
    [name] = store.list(".tables/")
    damage(store.caches[0].store, name, "flipped")
    last = TableStore(store, SCOPE.model).last()
    assert last is not None and last.digest == expected.digest


def test_a_damaged_part_of_the_records_in_a_cache(store: TieredStore) -> None:
    records = Records(store, SCOPE)
    save(records, 0, 1)
    records.compact()
    [part] = [name for name in store.list(".records/") if "/parts/" in name]
    damage(store.caches[0].store, part, "cut")
    assert known(Records(store, SCOPE), 2) == [0, 1]
