"""Encrypted blobs: read like others with the key, and by nobody else; what was tampered with is an error."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.encrypted import FRAME_BYTES, KEY_VARIABLE, EncryptedStore, key_from_environment
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore
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
    assert second.load(name, shape) is not None and opened(OTHER_KEY).load(name, shape) == "unreadable"
    with pytest.raises(StoreError, match="another key"):
        opened(OTHER_KEY).refresh()
    tokens = np.arange(300, dtype=np.int32).tobytes()
    for folder, _, files in os.walk(tmp_path):
        assert not any(tokens[:64] in (Path(folder) / file).read_bytes() for file in files)
    still = second.load(name, shape)
    assert not isinstance(still, str)  # the wrong key has deleted nothing
