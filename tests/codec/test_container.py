"""The stored object: what was put in comes out, and anything else is a clean error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_rag.chunk_kv import ChunkKV, chunk_key
from lmcache_rag.codec import CODECS, ObjectHeader, pack, peek_tokens, unpack
from lmcache_rag.errors import CorruptObjectError

SHAPE = (3, 2, 7, 2, 16)
RAW = CODECS["raw"].make(SHAPE[0], None)


def packed(dtype: torch.dtype = torch.float32) -> tuple[bytes, ChunkKV]:
    token_ids = np.arange(100, 100 + SHAPE[2], dtype=np.int32)
    chunk = ChunkKV(token_ids, torch.randn(SHAPE, dtype=torch.float32).to(dtype))
    layers, _, tokens, heads, size = SHAPE
    header = ObjectHeader(
        namespace="default",
        model="m" * 32,
        key=chunk_key(token_ids),
        variant="0" * 16,
        codec="raw",
        tokens=tokens,
        layers=layers,
        kv_heads=heads,
        head_size=size,
        dtype=str(dtype).removeprefix("torch."),
    )
    streams = [RAW.encode_layer(index, layer) for index, layer in enumerate(chunk.kv)]
    return b"".join(bytes(part) for part in pack(header, token_ids, streams)), chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_raw_is_lossless(dtype: torch.dtype) -> None:
    data, chunk = packed(dtype)
    stored = unpack(memoryview(bytearray(data)))
    assert stored.token_ids.tolist() == chunk.token_ids.tolist()
    for index, stream in enumerate(stored.layers):
        assert torch.equal(RAW.decode_layer(index, stream, SHAPE[2:], dtype), chunk.kv[index])


def test_streams_start_at_multiples_of_8_bytes() -> None:
    data, chunk = packed()
    for layer in chunk.kv:
        assert data.index(layer.numpy().tobytes()) % 8 == 0


def test_raw_refuses_a_stream_of_another_shape() -> None:
    with pytest.raises(CorruptObjectError, match="cannot have 12 bytes"):
        RAW.decode_layer(0, memoryview(bytearray(12)), (7, 2, 16), torch.float32)


def test_peek_reads_the_tokens_from_the_first_bytes() -> None:
    data, chunk = packed()
    view = memoryview(data)
    needed = peek_tokens(view[:64])
    assert isinstance(needed, int)
    more = peek_tokens(view[:needed])
    token_ids = more if isinstance(more, np.ndarray) else peek_tokens(view[:more])
    assert isinstance(token_ids, np.ndarray)
    assert token_ids.tolist() == chunk.token_ids.tolist()


@given(cut=st.integers(0, 3000))
@settings(deadline=None, max_examples=100)
def test_truncated_is_corrupt(cut: int) -> None:
    data, _ = packed()
    with pytest.raises(CorruptObjectError):
        unpack(memoryview(data)[: min(cut, len(data) - 1)])


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_flipped_bit_is_corrupt(data: st.DataObject) -> None:
    original, _ = packed()
    at = data.draw(st.integers(0, len(original) - 1))
    flipped = bytearray(original)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        stored = unpack(memoryview(flipped))
    except CorruptObjectError:
        return
    # Padding between streams carries nothing.
    assert [bytes(layer) for layer in stored.layers] == [bytes(layer) for layer in unpack(memoryview(original)).layers]


@given(junk=st.binary(max_size=300))
@settings(deadline=None, max_examples=200)
def test_hostile_bytes_are_corrupt(junk: bytes) -> None:
    for data in (junk, b"LMCRAGKV" + junk, b"LMCRAGKV\x02\x00\x00\x00" + junk):
        with pytest.raises(CorruptObjectError):
            unpack(memoryview(data))


def test_a_header_of_deeply_nested_json_is_corrupt() -> None:
    import struct

    import xxhash

    text = b"[" * 100_000
    prefix = struct.pack("<8sIIQ", b"LMCRAGKV", 2, len(text), xxhash.xxh3_64_intdigest(text))
    with pytest.raises(CorruptObjectError, match="header cannot be read"):
        unpack(memoryview(prefix + text))


def test_another_version_says_so() -> None:
    data = bytearray(packed()[0])
    data[8] = 9
    with pytest.raises(CorruptObjectError, match="format version 9"):
        unpack(memoryview(data))
