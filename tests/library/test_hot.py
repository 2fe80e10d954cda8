"""What is read again and again stays in memory, decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lmcache_rag_kernels import Rows

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import ChunkKV, KVShape
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.hot import HeldKV, HotChunks
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.names import parsed
from lmcache_rag.library.tables import ModelCodecs

MODEL = "f" * 32
SHAPE = KVShape(layers=2, kv_heads=2, head_size=16, dtype=torch.float32)
TOKENS = 40
CHUNK_BYTES = SHAPE.bytes_per_token * TOKENS


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStores:
    store = DiskStore(tmp_path)
    return ChunkStores(store, MODEL, "q8", ModelCodecs(store, MODEL, SHAPE))


def saved(chunks: ChunkStores, number: int) -> str:
    """The name of a stored chunk."""
    draw = torch.Generator().manual_seed(number)
    kv = torch.randn(2, 2, TOKENS, 2, 16, generator=draw)
    chunk = ChunkKV(np.arange(number, number + TOKENS, dtype=np.int32), kv)
    of = chunks.of("default")
    of.save(chunk, "0" * 16)
    return of.name(chunk.token_ids, "0" * 16)


def placed(kv: LoadedKV | HeldKV | str, offset: int = 0, length: int = TOKENS) -> torch.Tensor:
    assert not isinstance(kv, str)
    rows = Rows(torch.zeros(2, length, 2, 16), torch.zeros(2, length, 2, 16), 0, [None, None])
    kv.place(offset, rows)
    return torch.stack([rows.key, rows.value])


def test_what_was_read_twice_is_in_memory(chunks: ChunkStores, tmp_path: Path) -> None:
    hot, name = HotChunks(chunks, 10 * CHUNK_BYTES), saved(chunks, 1)
    first, second = hot.load(name, SHAPE), hot.load(name, SHAPE)
    assert not isinstance(first, str) and not isinstance(second, str) and second.size_bytes == first.size_bytes > 0
    assert hot.holds(name)
    (tmp_path / name).unlink()
    third = hot.load(name, SHAPE)
    assert not isinstance(third, str) and third.size_bytes == 0 and third.codec == "q8"
    assert third.tokens == TOKENS and third.token_ids.tolist() == list(range(1, 1 + TOKENS))
    assert torch.equal(placed(third), placed(first)) and torch.equal(placed(second), placed(first))
    assert torch.equal(placed(third, 5, 10), placed(first)[:, :, 5:15])
    part = hot.load(name, SHAPE, range(5, 15))
    assert not isinstance(part, str) and part.size_bytes == 0


def test_what_was_used_longest_ago_makes_room(chunks: ChunkStores) -> None:
    hot, names = HotChunks(chunks, 2 * CHUNK_BYTES), [saved(chunks, number) for number in (1, 100, 200)]
    for name in (names[0], names[0], names[1], names[1], names[0], names[2], names[2]):
        hot.load(name, SHAPE)
    sizes = [kv.size_bytes for kv in (hot.load(name, SHAPE) for name in names) if not isinstance(kv, str)]
    assert [bool(size) for size in sizes] == [False, True, False]
    assert hot.size_bytes == 2 * CHUNK_BYTES


@pytest.mark.parametrize("capacity", [0, CHUNK_BYTES - 1])
def test_what_is_larger_than_the_memory_for_it_is_read_each_time(chunks: ChunkStores, capacity: int) -> None:
    hot, name = HotChunks(chunks, capacity), saved(chunks, 1)
    found = [hot.load(name, SHAPE) for _ in range(4)]
    assert all(isinstance(kv, LoadedKV) for kv in found) and hot.size_bytes == 0


def test_what_is_damaged_is_not_kept(chunks: ChunkStores, tmp_path: Path) -> None:
    hot, name = HotChunks(chunks, 10 * CHUNK_BYTES), saved(chunks, 1)
    hot.load(name, SHAPE)
    (tmp_path / name).write_bytes(b"damaged")
    assert hot.load(name, SHAPE) == "corrupt" and hot.load(name, SHAPE) == "absent" and hot.size_bytes == 0


def test_what_is_in_memory_counts_as_used(chunks: ChunkStores) -> None:
    hot, name = HotChunks(chunks, 10 * CHUNK_BYTES), saved(chunks, 1)
    of = chunks.of("default")
    for _ in range(2):
        hot.load(name, SHAPE)
    key, form, _ = parsed(name)
    of.uses.flush()
    of.records.use({(key, form): 1})  # long ago
    hot.load(name, SHAPE)
    of.uses.flush()
    of.refresh()
    assert of.records.variants(key)[form].used_s > 1
