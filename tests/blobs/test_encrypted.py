"""Encrypted blobs: read like others with the key, and by nobody else; what was tampered with is an error."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.encrypted import (
    FRAME_BYTES,
    KEY_VARIABLE,
    EncryptedStore,
    key_from_environment,
    opened_as_marked,
)
from lmcache_rag.blobs.tiers import Cache, TieredStore
from lmcache_rag.blobs.uri import open_store
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.commands import store_app
from lmcache_rag.library.tables import ModelCodecs

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
NAME, OTHER = "default/model/ab/abcd/0000.raw.v1", "default/model/ab/abcd/0001.raw.v1"
SIZES = [0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES]


@pytest.fixture
def store(tmp_path: Path) -> EncryptedStore:
    return EncryptedStore(DiskStore(tmp_path), KEY)


def content(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def read(store: EncryptedStore, name: str = NAME, start: int = 0, length: int | None = None) -> bytes:
    found = store.read(name, start, length)
    assert found is not None
    return bytes(found)


@pytest.mark.parametrize("size", SIZES)
def test_what_was_written_is_read_whole_and_in_parts(store: EncryptedStore, size: int) -> None:
    data = content(size)
    assert store.write(NAME, [data[: size // 3], memoryview(data[size // 3 :])]) == size == store.size(NAME)
    mapped = store.map(NAME)
    assert read(store) == data and mapped is not None and bytes(mapped) == data
    places = [
        0,
        1,
        100,
        FRAME_BYTES - 1,
        FRAME_BYTES,
        FRAME_BYTES + 1,
        2 * FRAME_BYTES,
        size,
        size + 1,
        9 * FRAME_BYTES,
    ]
    for start in places:
        assert read(store, start=start) == data[start:]
        for length in (0, 1, FRAME_BYTES, FRAME_BYTES + 5, size, 5 * FRAME_BYTES):
            assert read(store, start=start, length=length) == data[start : start + length]
    assert store.read("none") is None and store.size("none") is None and store.map("none") is None
    assert not store.write_if_absent(NAME, [b"other"]) and read(store) == data


def test_nothing_of_a_blob_is_in_the_store_and_none_looks_like_another(store: EncryptedStore, tmp_path: Path) -> None:
    for name in (NAME, OTHER):
        store.write(name, [b"what nobody is to read " * 10])
    stored = [(tmp_path / name).read_bytes() for name in (NAME, OTHER)]
    assert not any(b"nobody" in sealed for sealed in stored) and stored[0][16:] != stored[1][16:]


@pytest.mark.parametrize("place", [0, 20, FRAME_BYTES + 40, -1])
def test_a_flipped_bit(store: EncryptedStore, tmp_path: Path, place: int) -> None:
    store.write(NAME, [content(2 * FRAME_BYTES)])
    data = bytearray((tmp_path / NAME).read_bytes())
    data[place] ^= 1
    (tmp_path / NAME).write_bytes(bytes(data))
    with pytest.raises(StoreError, match="cannot be decrypted"):
        store.read(NAME)


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_a_blob_that_ends_between_two_frames(store: EncryptedStore, tmp_path: Path, frames: int) -> None:
    store.write(NAME, [content(3 * FRAME_BYTES)])
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[: 16 + frames * (FRAME_BYTES + 16)])
    with pytest.raises(StoreError, match="cannot be decrypted"):
        store.read(NAME)
    if frames:  # also where the part would be whole
        with pytest.raises(StoreError, match="cannot be decrypted"):
            store.read(NAME, (frames - 1) * FRAME_BYTES, FRAME_BYTES)


def test_frames_in_another_order_and_blobs_under_another_name(store: EncryptedStore, tmp_path: Path) -> None:
    store.write(NAME, [content(3 * FRAME_BYTES)])
    path, step = tmp_path / NAME, FRAME_BYTES + 16
    data = path.read_bytes()
    (tmp_path / OTHER).write_bytes(data)
    with pytest.raises(StoreError, match="cannot be decrypted"):
        store.read(OTHER)
    path.write_bytes(data[:16] + data[16 + step : 16 + 2 * step] + data[16 : 16 + step] + data[16 + 2 * step :])
    with pytest.raises(StoreError, match="cannot be decrypted"):
        store.read(NAME)


def test_another_key_and_none(store: EncryptedStore, tmp_path: Path) -> None:
    store.write(NAME, [b"content"])
    with pytest.raises(StoreError, match="another key"):
        EncryptedStore(DiskStore(tmp_path), OTHER_KEY).read(NAME)
    DiskStore(tmp_path).write(OTHER, [b"in the clear"])
    with pytest.raises(StoreError, match="with none"):
        store.read(OTHER)


def test_a_store_is_opened_with_its_own_key_alone(tmp_path: Path) -> None:
    """Nobody takes what cannot be decrypted for damaged, and deletes it."""
    plain, sealed = DiskStore(tmp_path / "plain"), DiskStore(tmp_path / "sealed")
    first = opened_as_marked(sealed, KEY)
    first.write(NAME, [b"content"])
    assert opened_as_marked(sealed, KEY).read(NAME) == b"content"
    with pytest.raises(StoreError, match="is encrypted: set"):
        opened_as_marked(sealed, None)
    with pytest.raises(StoreError, match="another key"):
        opened_as_marked(sealed, OTHER_KEY)
    opened_as_marked(plain, None).write(NAME, [b"content"])
    with pytest.raises(StoreError, match="not encrypted"):
        opened_as_marked(plain, KEY)
    assert plain.read(NAME) == b"content"


def test_commands_refuse_an_encrypted_store_without_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, base64.b64encode(KEY).decode())
    open_store(tmp_path).write(NAME, [b"content"])
    monkeypatch.delenv(KEY_VARIABLE)
    for command in ("gc", "rebuild", "verify"):
        result = CliRunner().invoke(store_app, [command, str(tmp_path)])
        assert isinstance(result.exception, StoreError) and "is encrypted" in str(result.exception)
    assert (tmp_path / NAME).exists()


def test_a_damaged_copy_in_a_cache_is_read_from_the_origin(tmp_path: Path) -> None:
    cache = DiskStore(tmp_path / "cache")
    tiers = TieredStore([Cache("cache", cache)], DiskStore(tmp_path / "origin"))
    store = EncryptedStore(tiers, KEY)
    scope, shape = KVScope("default", "f" * 32), KVShape(layers=2, kv_heads=2, head_size=16, dtype=torch.float32)
    chunks = ChunkStore(store, scope, "raw", ModelCodecs(store, scope.model, shape))
    chunk = ChunkKV(np.arange(100, dtype=np.int32), torch.randn(2, 2, 100, 2, 16))
    chunks.save(chunk, "0" * 16)
    tiers.flush()
    name = chunks.name(chunk.token_ids, "0" * 16)
    data = bytearray((tmp_path / "cache" / name).read_bytes())
    data[100] ^= 1
    (tmp_path / "cache" / name).write_bytes(bytes(data))
    loaded = chunks.load(name, shape)
    assert not isinstance(loaded, str) and torch.equal(loaded.kv(), chunk.kv)
    assert tiers.stats()["cache"].healed == 1


def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert key_from_environment() is None
    monkeypatch.setenv(KEY_VARIABLE, base64.b64encode(KEY).decode())
    assert key_from_environment() == KEY
    for text in ("no base64 ?", base64.b64encode(KEY[:16]).decode()):
        monkeypatch.setenv(KEY_VARIABLE, text)
        with pytest.raises(StoreError, match=KEY_VARIABLE) as raised:
            key_from_environment()
        assert text not in str(raised.value)
    with pytest.raises(StoreError, match="32 bytes"):
        EncryptedStore(DiskStore(tmp_path), b"short")


def test_chunks_in_an_encrypted_store(store: EncryptedStore, tmp_path: Path) -> None:
    shape = KVShape(layers=2, kv_heads=2, head_size=16, dtype=torch.float32)
    scope = KVScope("default", "f" * 32)
    chunk = ChunkKV(np.arange(300, dtype=np.int32), torch.randn(2, 2, 300, 2, 16))

    def opened(key: bytes) -> ChunkStore:
        encrypted = EncryptedStore(DiskStore(tmp_path), key)
        return ChunkStore(encrypted, scope, "raw", ModelCodecs(encrypted, scope.model, shape))

    first = opened(KEY)
    first.save(chunk, "0" * 16)
    first.records.compact()
    second, name = opened(KEY), first.name(chunk.token_ids, "0" * 16)
    second.refresh()
    assert len(list(second.records.keys())) == 1
    loaded, part = second.load(name, shape), second.load(name, shape, range(100, 120))
    assert not isinstance(loaded, str) and torch.equal(loaded.kv(), chunk.kv)
    assert not isinstance(part, str) and part.size_bytes < loaded.size_bytes
    tokens = np.arange(300, dtype=np.int32).tobytes()
    for folder, _, files in os.walk(tmp_path):
        assert not any(tokens[:64] in (Path(folder) / file).read_bytes() for file in files)
