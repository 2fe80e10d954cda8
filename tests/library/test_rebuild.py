"""Records made anew from the objects."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape, key_of
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.rebuild import rebuild
from lmcache_rag.library.scopes import scopes_of
from lmcache_rag.library.tables import ModelCodecs

SHAPE = KVShape(layers=1, kv_heads=1, head_size=2, dtype=torch.float32)
SCOPE = KVScope("default", "f" * 32)
OWN, OTHER = "a" * 16, "b" * 16


def chunk(number: int, tokens: int = 40) -> ChunkKV:
    return ChunkKV(np.arange(number, number + tokens, dtype=np.int32), torch.zeros(1, 2, tokens, 1, 2))


def opened(store: DiskStore) -> ChunkStore:
    chunks = ChunkStore(store, SCOPE, "raw", ModelCodecs(store, SCOPE.model, SHAPE))
    chunks.refresh()
    return chunks


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    store = DiskStore(tmp_path)
    chunks = opened(store)
    for number in range(5):
        chunks.save(chunk(number), OWN)
    chunks.save(chunk(2), OTHER)
    chunks.save(chunk(9, 10_000), OWN)  # whose tokens do not lie in the first bytes read
    return store


def test_lost_records_are_made_anew(store: DiskStore) -> None:
    before = opened(store)
    shutil.rmtree(store.root / ".records")
    assert opened(store).variants(key_of(chunk(2).token_ids)) == {}
    assert scopes_of(store) == [SCOPE]
    seen: list[int] = []
    assert rebuild(store, SCOPE, seen.append) == 7 == len(seen)
    after = opened(store)
    assert set(after.records.keys()) == set(before.records.keys())
    for key in before.records.keys():  # noqa: SIM118  # not a dict
        expected, found = before.variants(key), after.variants(key)
        assert {form.name: form.size_bytes for form in expected.values()} == {
            form.name: form.size_bytes for form in found.values()
        }
        assert (before.records.tokens(key) == after.records.tokens(key)).all()


def test_what_cannot_be_read_now_is_not_left_out(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails for a moment: what it held would be taken for garbage afterwards."""
    name, size = opened(store).name(chunk(3).token_ids, OWN), store.size

    def fails(asked: str) -> int | None:
        if asked == name:
            raise StoreError("it took too long")
        return size(asked)

    monkeypatch.setattr(store, "size", fails)
    with pytest.raises(StoreError, match="it took too long"):
        rebuild(store, SCOPE)
    assert set(opened(store).variants(key_of(chunk(3).token_ids))) == {OWN}


def test_what_was_recorded_and_is_not_there_is_forgotten_also_by_those_who_have_it_open(store: DiskStore) -> None:
    chunks = opened(store)
    store.delete([chunks.name(chunk(0).token_ids, OWN)])
    store.write(chunks.name(chunk(1).token_ids, OWN), [b"damaged"])
    store.write(f"{SCOPE.folder(key_of(chunk(3).token_ids))}{OWN}.raw.v1", [b"of an older release"])
    assert rebuild(store, SCOPE) == 5
    for view in (opened(store), chunks):
        view.refresh()
        assert not view.variants(key_of(chunk(0).token_ids)) and not view.variants(key_of(chunk(1).token_ids))
        assert set(view.variants(key_of(chunk(2).token_ids))) == {OWN, OTHER}
    chunks.save(chunk(0), OWN)
    other = opened(store)
    assert set(other.variants(key_of(chunk(0).token_ids))) == {OWN}
