"""Which scopes a room keeps open, and who waits for it to delete."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape, variant_of
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.names import learned_of
from lmcache_rag.library.room import Limits, Room, Rooms
from lmcache_rag.library.tables import ModelCodecs
from tests.stores import MemoryStore

MODEL = "f" * 32
SHAPE = KVShape(layers=2, kv_heads=1, head_size=8, dtype=torch.float32)
TENANTS = 40


def save(store: MemoryStore, rooms: Rooms, namespace: str) -> None:
    chunks = ChunkStore(store, KVScope(namespace, MODEL), "raw", ModelCodecs(store, MODEL, SHAPE), rooms=rooms)
    tokens = np.arange(64, dtype=np.int32)
    chunks.save(ChunkKV(tokens, torch.zeros(2, 2, 64, 1, 8)), variant_of(tokens[:7]))


@pytest.mark.parametrize("capacity_bytes", [None, 1 << 30])
def test_tenants_records_do_not_stay_open_but_where_they_count_towards_a_limit(capacity_bytes: int | None) -> None:
    store = MemoryStore()
    rooms = Rooms(store, Limits(capacity_bytes=capacity_bytes))
    for number in range(TENANTS):
        save(store, rooms, learned_of("docs", f"salt {number}"))
    gc.collect()
    assert len(rooms.of("docs")._all()) == (0 if capacity_bytes is None else TENANTS)
    again = Rooms(store, Limits(capacity_bytes=capacity_bytes))
    save(store, again, "docs")  # it looks for what has expired, among all of them
    gc.collect()
    assert len(again.of("docs")._all()) == (0 if capacity_bytes is None else TENANTS + 1)


def test_who_opens_a_scope_does_not_wait_for_what_is_deleted() -> None:
    """Over a network that takes long, and requests are answered meanwhile."""
    room = Room(MemoryStore(), "docs", Limits())
    with room._lock, ThreadPoolExecutor(1) as pool:  # as while it expires
        opened = pool.submit(room.records, KVScope("docs", MODEL))
        assert opened.result(timeout=60) is room.records(KVScope("docs", MODEL))
