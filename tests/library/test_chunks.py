"""Chunk KV in a store: variants, and every reason not to use an object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lmcache_rag_kernels import Rows

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape, key_of
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.records.part import VariantRow
from tests.helpers import chunk_store

SHAPE = KVShape(layers=2, kv_heads=1, head_size=4, dtype=torch.float32)
TOKENS = np.arange(5, dtype=np.int32)
OWN, OTHER = "a" * 16, "b" * 16


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStore:
    return chunk_store(DiskStore(tmp_path), KVScope("default", "f" * 32), SHAPE)


def test_variants_are_kept_apart(chunks: ChunkStore) -> None:
    kv = {variant: torch.randn(2, 2, 5, 1, 4) for variant in (OWN, OTHER)}
    for variant, values in kv.items():
        chunks.save(ChunkKV(TOKENS, values), variant)
    variants = chunks.variants(key_of(TOKENS))
    assert set(variants) == {OWN, OTHER}
    for variant, form in variants.items():
        loaded = chunks.load(form.name, SHAPE)
        assert isinstance(loaded, LoadedKV)
        assert torch.equal(loaded.kv(), kv[variant])
    assert chunks.variants(key_of(TOKENS[:4])) == {}


def test_objects_of_unknown_codecs_are_no_variants(chunks: ChunkStore) -> None:
    key = key_of(TOKENS)
    chunks.records.add({key: TOKENS}, [VariantRow(key, f"{OWN}.newer", 10, 0)])
    assert chunks.variants(key) == {}


def test_objects_of_the_version_before_are_a_miss(chunks: ChunkStore) -> None:
    """They are not looked at under their own name, and under another they are not what this release reads."""
    chunks.save(ChunkKV(TOKENS, torch.randn(2, 2, 5, 1, 4)), OWN)
    name = chunks.name(TOKENS, OWN)
    data = chunks.store.read(name)
    assert data is not None
    data[8] = 2
    chunks.store.delete([name])
    chunks.store.write(f"{name.removesuffix('.v3')}.v2", [data])
    assert chunks.missing(TOKENS, OWN) == ["raw"]
    chunks.store.write(name, [data])
    assert chunks.load(name, SHAPE) == "corrupt"
    assert chunks.missing(TOKENS, OWN) == ["raw"]  # and so it is computed again


def test_the_state_of_an_owners_chunks_changes_where_one_comes_or_goes_and_not_where_one_is_used(
    chunks: ChunkStore,
) -> None:
    key = key_of(TOKENS)
    none = chunks.state("me")
    assert none == ""
    chunks.save(ChunkKV(TOKENS, torch.zeros(2, 2, 5, 1, 4)), OWN)
    chunks.own("somebody else", [key])
    assert chunks.state("me") == none
    chunks.own("me", [key])
    stored, position = chunks.state("me"), chunks.records.position
    assert stored != none
    ((form, row),) = chunks.records.variants(key).items()
    chunks.records.use({(key, form): int(row.used_s) + 1000})
    assert chunks.records.position != position
    assert chunks.state("me") == stored
    chunks.delete([key])
    assert chunks.state("me") == none


def test_absent(chunks: ChunkStore) -> None:
    assert chunks.load(chunks.name(TOKENS, OWN), SHAPE) == "absent"


def test_corrupt_is_deleted_so_that_it_is_computed_again(chunks: ChunkStore) -> None:
    chunks.save(ChunkKV(TOKENS, torch.zeros(2, 2, 5, 1, 4)), OWN)
    name = chunks.name(TOKENS, OWN)
    path = chunks.store.root.joinpath(*name.split("/"))  # type: ignore[attr-defined]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert chunks.load(name, SHAPE) == "corrupt"
    assert not chunks.store.exists(name)


@pytest.mark.parametrize(
    "shape",
    [
        KVShape(layers=3, kv_heads=1, head_size=4, dtype=torch.float32),
        KVShape(layers=2, kv_heads=2, head_size=4, dtype=torch.float32),
        KVShape(layers=2, kv_heads=1, head_size=4, dtype=torch.bfloat16),
    ],
    ids=["layers", "heads", "dtype"],
)
def test_of_another_shape(chunks: ChunkStore, shape: KVShape) -> None:
    chunks.save(ChunkKV(TOKENS, torch.zeros(2, 2, 5, 1, 4)), OWN)
    assert chunks.load(chunks.name(TOKENS, OWN), shape) == "of another model"


def test_an_object_put_under_another_chunks_or_variants_name(chunks: ChunkStore) -> None:
    chunks.save(ChunkKV(TOKENS, torch.zeros(2, 2, 5, 1, 4)), OWN)
    data = chunks.store.read(chunks.name(TOKENS, OWN))
    assert data is not None
    for name in (chunks.name(TOKENS, OTHER), chunks.name(TOKENS[::-1], OWN)):
        chunks.store.write(name, [data])
        assert chunks.load(name, SHAPE) == "of another chunk"


@pytest.mark.parametrize(
    "scope", [KVScope("other", "f" * 32), KVScope("default", "e" * 32)], ids=["namespace", "model"]
)
def test_an_object_put_where_it_does_not_belong(chunks: ChunkStore, scope: KVScope) -> None:
    """Somebody copied files about: the object says itself what it is."""
    chunks.save(ChunkKV(TOKENS, torch.zeros(2, 2, 5, 1, 4)), OWN)
    elsewhere = chunk_store(chunks.store, scope, SHAPE)
    data = chunks.store.read(chunks.name(TOKENS, OWN))
    assert data is not None
    elsewhere.store.write(elsewhere.name(TOKENS, OWN), [data])
    assert elsewhere.load(elsewhere.name(TOKENS, OWN), SHAPE) == "of another model"


@pytest.mark.parametrize("part", [range(10), range(60, 70), range(64, 128), range(150, 200)], ids=str)
def test_a_part_of_a_chunk_is_read_alone(tmp_path: Path, part: range) -> None:
    shape = KVShape(layers=2, kv_heads=1, head_size=64, dtype=torch.float32)
    chunks = chunk_store(DiskStore(tmp_path), KVScope("default", "f" * 32), shape)
    tokens = np.arange(200, dtype=np.int32)
    kv = torch.randn(2, 2, 200, 1, 64)
    size_bytes = chunks.save(ChunkKV(tokens, kv), OWN)
    loaded = chunks.load(chunks.name(tokens, OWN), shape, part)
    assert isinstance(loaded, LoadedKV) and loaded.size_bytes < 0.9 * size_bytes
    key, value = torch.empty(2, 2, len(part), 1, 64)
    loaded.place(part.start, Rows(key, value, 0, [None, None]))
    assert torch.equal(key, kv[:, 0, part.start : part.stop])
    assert torch.equal(value, kv[:, 1, part.start : part.stop])
    assert chunks.load(chunks.name(tokens, OWN), shape, range(150, 201)) == "shorter than planned"


def test_a_damaged_group_is_corrupt_where_it_is_wanted_only(tmp_path: Path) -> None:
    shape = KVShape(layers=2, kv_heads=1, head_size=64, dtype=torch.float32)
    chunks = chunk_store(DiskStore(tmp_path), KVScope("default", "f" * 32), shape)
    tokens = np.arange(200, dtype=np.int32)
    chunks.save(ChunkKV(tokens, torch.randn(2, 2, 200, 1, 64)), OWN)
    name = chunks.name(tokens, OWN)
    path = tmp_path.joinpath(*name.split("/"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert isinstance(chunks.load(name, shape, range(20)), LoadedKV)
    assert chunks.load(name, shape, range(190, 200)) == "corrupt"
    assert not path.exists()
