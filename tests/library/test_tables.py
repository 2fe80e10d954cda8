"""Codec tables in a store: the last ones are for writing, all are for reading, and missing ones are a miss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape, key_of
from lmcache_rag.codec.tables import CodecTables, learn_tables
from lmcache_rag.errors import CorruptObjectError, StoreError
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.tables import ModelCodecs, TableStore

SHAPE = KVShape(layers=2, kv_heads=1, head_size=8, dtype=torch.float32)
SCOPE = KVScope("default", "f" * 32)
TOKENS = np.arange(40, dtype=np.int32)
VARIANT = "a" * 16


def tables(seed: int, width: int = 8) -> CodecTables:
    draw = torch.Generator().manual_seed(seed)
    return learn_tables(torch.randn(2, 2, 500, width, generator=draw), torch.eye(width).expand(2, 2, 1, -1, -1))


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "kv")


def chunks_of(store: DiskStore, codec: str = "balanced", own: DiskStore | None = None) -> ChunkStore:
    return ChunkStore(store, SCOPE, codec, ModelCodecs(store, SCOPE.model, SHAPE, own))


def chunk() -> ChunkKV:
    return ChunkKV(TOKENS, torch.randn(2, 2, len(TOKENS), 1, 8))


def test_the_last_tables_are_for_writing(store: DiskStore) -> None:
    kept = TableStore(store, SCOPE.model)
    assert kept.last() is None and kept.named("0" * 16) is None
    first, second = tables(1), tables(2)
    kept.add(first)
    kept.add(first)
    kept.add(second)
    last = kept.last()
    assert last is not None and last.digest == second.digest
    named = kept.named(first.digest)
    assert named is not None and named.digest == first.digest
    assert TableStore(store, "e" * 32).last() is None


def test_what_was_coded_with_older_tables_stays_readable(store: DiskStore) -> None:
    kept = TableStore(store, SCOPE.model)
    kept.add(tables(1))
    kv = chunk()
    assert chunks_of(store).save(kv, VARIANT) > 0
    kept.add(tables(2))
    loaded = chunks_of(store).load(chunks_of(store).name(TOKENS, VARIANT), SHAPE)
    assert isinstance(loaded, LoadedKV) and loaded.codec == "balanced"
    assert float((loaded.kv() - kv.kv).norm() / kv.kv.norm()) < 0.3


def test_this_machines_tables_are_copied_into_the_store(store: DiskStore, tmp_path: Path) -> None:
    own = DiskStore(tmp_path / "own")
    TableStore(own, SCOPE.model).add(tables(1))
    chunks_of(store, own=own).save(chunk(), VARIANT)
    assert isinstance(chunks_of(store).load(chunks_of(store).name(TOKENS, VARIANT), SHAPE), LoadedKV)


def test_without_tables_nothing_is_stored_and_the_error_says_what_to_do(store: DiskStore) -> None:
    with pytest.raises(StoreError, match="run `lmcache-rag calibrate`"):
        chunks_of(store).save(chunk(), VARIANT)
    assert chunks_of(store).variants(key_of(TOKENS)) == {}
    assert chunks_of(store, "q8").save(chunk(), VARIANT) > 0


def test_missing_tables_are_a_miss_with_a_reason(store: DiskStore) -> None:
    TableStore(store, SCOPE.model).add(tables(1))
    chunks_of(store).save(chunk(), VARIANT)
    name = chunks_of(store).name(TOKENS, VARIANT)
    for path in (store.root / ".tables").rglob("0*"):
        path.unlink()
    assert chunks_of(store).load(name, SHAPE) == "coded with tables that are missing"
    assert store.exists(name)  # whoever has the tables can still use it


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "gone"])
def test_damaged_tables_are_a_miss_until_they_are_there_again(store: DiskStore, tmp_path: Path, damage: str) -> None:
    TableStore(store, SCOPE.model).add(tables(1))
    chunks_of(store).save(chunk(), VARIANT)
    name = chunks_of(store).name(TOKENS, VARIANT)
    path = next((store.root / ".tables").rglob("0*"))
    content = {"cut": path.read_bytes()[:-9], "other": tables(3).to_bytes(), "empty": b""}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[damage])
    assert chunks_of(store).load(name, SHAPE) == "coded with tables that are missing"
    assert TableStore(store, SCOPE.model).last() is None
    own = DiskStore(tmp_path / "own")
    TableStore(own, SCOPE.model).add(tables(1))
    assert isinstance(chunks_of(store, own=own).load(name, SHAPE), LoadedKV)
    assert isinstance(chunks_of(store).load(name, SHAPE), LoadedKV)  # the store has them again


def test_tables_of_another_form_are_none(store: DiskStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the release before left in the store and on the machine: learned again, and passed over from then on."""
    arrays = safetensors.numpy.load(tables(1).to_bytes())
    arrays["backward"] = arrays.pop("directions")[:, :, 0]
    del arrays["form"]
    own = DiskStore(tmp_path / "own")
    for where in (store, own):
        where.write(f".tables/{SCOPE.model}/000001.{'0' * 16}", [safetensors.numpy.save(arrays)])
    assert TableStore(store, SCOPE.model).last() is None
    assert "tables of another form" in caplog.text
    with pytest.raises(StoreError, match="no tables yet"):
        chunks_of(store, own=own).save(chunk(), VARIANT)
    TableStore(store, SCOPE.model).add(tables(1))
    chunks_of(store, own=own).save(chunk(), VARIANT)
    assert isinstance(chunks_of(store).load(chunks_of(store).name(TOKENS, VARIANT), SHAPE), LoadedKV)


def test_tables_of_another_shape_are_refused(store: DiskStore) -> None:
    TableStore(store, SCOPE.model).add(tables(1, width=16))
    with pytest.raises(CorruptObjectError, match="another shape"):
        chunks_of(store).save(chunk(), VARIANT)


def test_extra_codecs_are_stored_and_listed_by_falling_fidelity(store: DiskStore) -> None:
    TableStore(store, SCOPE.model).add(tables(1))
    codecs = ModelCodecs(store, SCOPE.model, SHAPE)
    chunks = ChunkStore(store, SCOPE, "balanced", codecs, extra=("small", "raw"))
    assert chunks.missing(TOKENS, VARIANT) == ["balanced", "small", "raw"]
    chunks.save(chunk(), VARIANT)
    assert chunks.missing(TOKENS, VARIANT) == []
    name = chunks.variants(key_of(TOKENS))[VARIANT].name
    assert name == chunks.name(TOKENS, VARIANT)
    forms = chunks.forms(name)
    assert [form.name.split(".")[-2] for form in forms] == ["raw", "balanced", "small"]
    assert [form.size_bytes for form in forms] == sorted((form.size_bytes for form in forms), reverse=True)
    other = chunks_of(store, "q8")
    other.refresh()
    assert other.variants(key_of(TOKENS))[VARIANT].name == forms[0].name  # the best, where its own is missing


def test_kv_that_is_no_number_is_not_stored(store: DiskStore) -> None:
    kv = chunk()
    kv.kv[1, 0, 3] = torch.nan
    with pytest.raises(StoreError, match="no finite number"):
        chunks_of(store, "raw").save(kv, VARIANT)
