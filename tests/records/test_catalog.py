"""Finding stored chunks in prompts by their tokens."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.tables import ModelCodecs
from lmcache_rag.records.catalog import Catalog
from tests.helpers import chunk_store

SHAPE = KVShape(layers=1, kv_heads=1, head_size=2, dtype=torch.float32)
SCOPE = KVScope("default", "f" * 32)


def tokens(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(count)]


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStore:
    return chunk_store(DiskStore(tmp_path), SCOPE, SHAPE)


def save(chunks: ChunkStore, token_ids: list[int], variant: str = "a" * 16) -> None:
    kv = torch.zeros(1, 2, len(token_ids), 1, 2)
    chunks.save(ChunkKV(np.array(token_ids, dtype=np.int32), kv), variant)


def found(catalog: Catalog, prompt: list[int]) -> list[tuple[int, int, int]]:
    matches = catalog.find(prompt)
    for match in matches:
        expected = match.chunk[match.offset : match.offset + match.length].tolist()
        assert prompt[match.start : match.start + match.length] == expected
    return [(match.start, match.length, match.offset) for match in matches]


def test_whole_chunks_anywhere(chunks: ChunkStore) -> None:
    one, two = tokens(1, 200), tokens(2, 90)
    save(chunks, one)
    save(chunks, two)
    catalog = Catalog(chunks.store, SCOPE)
    prompt = [*tokens(3, 21), *two, *tokens(4, 5), *one, *tokens(5, 9)]
    assert found(catalog, prompt) == [(21, 90, 0), (116, 200, 0)]


def test_edges_that_merged_with_neighbours_and_parts(chunks: ChunkStore) -> None:
    chunk = tokens(1, 200)
    save(chunks, chunk)
    catalog = Catalog(chunks.store, SCOPE)
    assert found(catalog, [5, 6, 7, *chunk[2:-3], 8, 9]) == [(3, 195, 2)]
    assert found(catalog, [5, *chunk[60:110], 6]) == [(1, 50, 60)]


@pytest.mark.parametrize("length", [32, 33, 47, 64])
@pytest.mark.parametrize("start", [0, 1, 77, 136])
def test_every_run_of_the_shortest_length_is_found(chunks: ChunkStore, length: int, start: int) -> None:
    chunk = tokens(7, 200)
    save(chunks, chunk)
    run = chunk[start : start + length]
    assert found(Catalog(chunks.store, SCOPE, min_match=32), [1001, *run, 1002]) == [(1, length, start)]


def test_shorter_runs_are_left_alone(chunks: ChunkStore) -> None:
    chunk = tokens(1, 200)
    save(chunks, chunk)
    assert found(Catalog(chunks.store, SCOPE), [1001, *chunk[50:81], 1002]) == []


def test_the_same_chunk_twice_and_overlapping_chunks(chunks: ChunkStore) -> None:
    text = tokens(1, 300)
    save(chunks, text[:180])
    save(chunks, text[140:])
    catalog = Catalog(chunks.store, SCOPE)
    assert found(catalog, text) == [(0, 180, 0), (180, 120, 40)]
    assert found(catalog, [*text[:180], 1001, *text[:180]]) == [(0, 180, 0), (181, 180, 0)]


def test_longest_of_chunks_that_begin_alike(chunks: ChunkStore) -> None:
    text = tokens(1, 300)
    save(chunks, text[:60])
    save(chunks, text[:250])
    assert found(Catalog(chunks.store, SCOPE), [*text, 1001]) == [(0, 250, 0)]


def test_follows_the_store(chunks: ChunkStore) -> None:
    chunk = tokens(1, 100)
    catalog = Catalog(chunks.store, SCOPE)
    assert found(catalog, chunk) == []
    save(chunks, chunk)
    assert found(catalog, chunk) == [(0, 100, 0)]
    chunks.store.delete(list(chunks.store.list(SCOPE.prefix)))
    assert found(catalog, chunk) == []


def test_other_namespaces_and_models_are_not_seen(chunks: ChunkStore) -> None:
    chunk = tokens(1, 100)
    save(chunks, chunk)
    assert Catalog(chunks.store, KVScope("other", SCOPE.model)).find(chunk) == []
    assert Catalog(chunks.store, KVScope("default", "e" * 32)).find(chunk) == []


def test_corrupt_objects_are_left_out(chunks: ChunkStore) -> None:
    chunk = tokens(1, 100)
    save(chunks, chunk)
    chunks.store.write(chunks.name(chunk, "a" * 16), [b"LMCRAGKV nonsense"])
    assert found(Catalog(chunks.store, SCOPE), chunk) == []


def test_long_chunk_needs_a_longer_look(chunks: ChunkStore) -> None:
    chunk = tokens(1, 20_000)
    save(chunks, chunk)
    assert found(Catalog(chunks.store, SCOPE), [1001, *chunk[19_000:], 1002]) == [(1, 1000, 19_000)]


def test_a_chunk_of_which_one_object_is_damaged_is_found_by_another(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    chunks = ChunkStore(store, SCOPE, "raw", ModelCodecs(store, SCOPE.model, SHAPE), extra=("q8", "q4"))
    token_ids = tokens(1, 100)
    save(chunks, token_ids)
    names = sorted(store.list(SCOPE.prefix))
    assert len(names) == 3
    for name in (names[0], names[2]):
        store.write(name, [b"damaged"])
    store.write(names[1].replace(".v3", ".v2"), [b"of an older release"])
    assert found(Catalog(store, SCOPE), token_ids) == [(0, 100, 0)]
