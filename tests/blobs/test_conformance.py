"""What every store does, on real servers: the same as on a disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape, key_of
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.rebuild import rebuild
from lmcache_rag.library.scopes import scopes_of
from lmcache_rag.library.tables import TableStore
from lmcache_rag.records import records as module
from lmcache_rag.records.records import Records
from tests.blobs.conftest import Opener
from tests.helpers import chunk_store
from tests.library.test_tables import tables as learned
from tests.records.test_records import known, save

NAME = "default/model/ab/abcd/0000.raw.v1"
SCOPE = KVScope("default", "f" * 32)
SHAPE = KVShape(layers=2, kv_heads=1, head_size=4, dtype=torch.float32)


def read(store: Store, name: str, start: int = 0, length: int | None = None) -> bytes | None:
    data = store.read(name, start, length)
    return None if data is None else bytes(data)


def test_write_read_list_delete(store: Store) -> None:
    assert read(store, NAME) is None and store.map(NAME) is None and store.size(NAME) is None and not store.exists(NAME)
    assert store.write(NAME, [b"one", memoryview(b"two")]) == 6
    assert store.exists(NAME) and store.size(NAME) == 6 and read(store, NAME) == b"onetwo"
    mapped = store.map(NAME)
    assert mapped is not None and bytes(mapped) == b"onetwo"
    store.write("default/other/cd", [b"x"])
    assert list(store.folders("default/")) == ["model", "other"] and list(store.folders("none/")) == []
    assert list(store.folders("")) == [name for name in store.folders("") if name == "default" or name[0] == "."]
    assert list(store.folders("default/other/")) == ["cd"]
    assert list(store.list("default/model/")) == [NAME] and set(store.list("")) == {NAME, "default/other/cd"}
    assert list(store.list("none/")) == []
    store.write(NAME, [b"three"])
    assert read(store, NAME) == b"three" and store.size(NAME) == 5
    store.delete([NAME, "default/model/never/there", "default/other/cd"])
    assert not store.exists(NAME) and read(store, NAME) is None and list(store.list("default/")) == []
    store.delete([])


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 4, b"onet"),
        (2, 3, b"etw"),
        (4, 100, b"wo"),
        (4, None, b"wo"),
        (6, 1, b""),
        (9, 1, b""),
        (9, None, b""),
        (2, 0, b""),
        (0, 0, b""),
    ],
)
def test_a_part_also_past_the_end(store: Store, start: int, length: int | None, expected: bytes) -> None:
    assert read(store, NAME, start, length) is None
    store.write(NAME, [b"onetwo"])
    assert read(store, NAME, start, length) == expected


def test_an_empty_blob_is_there(store: Store) -> None:
    store.write(NAME, [])
    assert store.exists(NAME) and store.size(NAME) == 0
    assert read(store, NAME) == read(store, NAME, 0, 10) == read(store, NAME, 3, 10) == b""
    mapped = store.map(NAME)
    assert mapped is not None and not len(mapped)
    assert not store.write_if_absent(NAME, [b"x"])
    assert store.write_if_absent(f"{NAME}2", [b""]) and read(store, f"{NAME}2") == b""


@pytest.mark.parametrize(
    "name", ["a b", "a%20b", "ä", "x*?[y]", "a#b", "'q\"", "a:b", "~", "a+b&c=d", ".hidden", "a\\b"]
)
def test_odd_names(store: Store, name: str) -> None:
    store.write(f"odd/{name}/1", [b"one"])
    store.write("odd/other", [b"three"])
    assert read(store, f"odd/{name}/1") == b"one" and store.exists(f"odd/{name}/1")
    assert list(store.list(f"odd/{name}/")) == [f"odd/{name}/1"]
    assert sorted(store.folders("odd/")) == sorted([name, "other"])
    store.delete([f"odd/{name}/1"])
    assert not store.exists(f"odd/{name}/1") and read(store, "odd/other") == b"three"


def test_of_several_writers_one_is_first(open_again: Opener) -> None:
    stores = [open_again() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda number: stores[number].write_if_absent(NAME, [bytes([number])]), range(8)))
    assert sum(first) == 1
    assert read(stores[0], NAME) == bytes([first.index(True)])


def test_many_megabytes(store: Store) -> None:
    content = np.random.default_rng(0).bytes(20 << 20)
    assert store.write(NAME, [content[: 5 << 20], memoryview(content)[5 << 20 :]]) == len(content)
    assert read(store, NAME) == content and store.size(NAME) == len(content)
    assert read(store, NAME, 7 << 20, 1000) == content[7 << 20 : (7 << 20) + 1000]
    mapped = store.map(NAME)
    assert mapped is not None and bytes(mapped) == content


def test_what_is_read_may_be_written_to(store: Store) -> None:
    """As PyTorch asks of a buffer."""
    store.write(NAME, [b"onetwo"])
    for length in (None, 3):
        data = store.read(NAME, 0, length)
        assert data is not None and not data.readonly and data.format == "B"


def test_records_of_two_writers(open_again: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SEGMENTS", 1 << 30)  # only when asked for
    one, two = Records(open_again(), SCOPE), Records(open_again(), SCOPE)
    for number in range(0, 12, 2):
        save(one, number)
        save(two, number + 1)
        if number in (4, 8):
            two.compact()
    save(one, 3, size=0)
    expected = [number for number in range(12) if number != 3]
    for records in (one, two, Records(open_again(), SCOPE)):
        assert known(records, 12) == expected
    one.compact()
    assert known(two, 12) == expected == known(Records(open_again(), SCOPE), 12)


def test_records_of_several_writers_at_once(open_again: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SEGMENTS", 8)  # so that epochs end while others write
    writers = [Records(open_again(), SCOPE) for _ in range(3)]

    def write(place: int) -> None:
        for number in range(place, 36, 3):
            save(writers[place], number)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    for records in writers:
        with records._compacting:  # waits for what is under way
            pass
    monkeypatch.setattr(module, "_LOOK_S", -1.0)  # some slept through epochs
    for records in (*writers, Records(open_again(), SCOPE)):
        assert known(records, 36) == list(range(36))
    assert writers[0].position[0] > 1


def test_chunks_tables_and_rebuilding(open_again: Opener) -> None:
    store = open_again()
    chunks = chunk_store(store, SCOPE, SHAPE)
    tokens, kv = np.arange(5, dtype=np.int32), torch.randn(2, 2, 5, 1, 4)
    chunks.save(ChunkKV(tokens, kv), "a" * 16)
    other = chunk_store(open_again(), SCOPE, SHAPE)
    other.refresh()
    form = other.variants(key_of(tokens))["a" * 16]
    loaded = other.load(form.name, SHAPE)
    assert isinstance(loaded, LoadedKV) and torch.equal(loaded.kv(), kv)
    assert scopes_of(store) == [SCOPE]
    store.delete(list(store.list(".records/")))
    assert rebuild(open_again(), SCOPE) == 1
    again = ChunkStore(open_again(), SCOPE, "raw")
    again.refresh()
    assert set(again.variants(key_of(tokens))) == {"a" * 16}

    tables = learned(1)
    TableStore(store, SCOPE.model).add(tables)
    last = TableStore(open_again(), SCOPE.model).last()
    assert last is not None and last.digest == tables.digest
