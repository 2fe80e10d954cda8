"""The stored object: what was put in comes out, whole or in part, and anything else is a clean error."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_rag.chunk_kv import ChunkKV, chunk_key
from lmcache_rag.codec import (
    ObjectHeader,
    ObjectIndex,
    StoredObject,
    open_index,
    pack,
    unpack,
    unpack_range,
)
from lmcache_rag.codec.raw import RawCodec
from lmcache_rag.errors import CorruptObjectError

SHAPE = (3, 2, 20, 2, 4)
GROUP = 8
RAW = RawCodec()


def header_of(token_ids: np.ndarray, dtype: torch.dtype = torch.float32, **changes: int) -> ObjectHeader:
    layers, _, tokens, heads, size = SHAPE
    return ObjectHeader(
        namespace="default",
        model="m" * 32,
        key=chunk_key(token_ids),
        variant="0" * 16,
        codec="raw",
        dtype=str(dtype).removeprefix("torch."),
        **{"tokens": tokens, "group": GROUP, "layers": layers, "kv_heads": heads, "head_size": size, **changes},
    )


def packed(dtype: torch.dtype = torch.float32) -> tuple[bytes, ChunkKV]:
    token_ids = np.arange(100, 100 + SHAPE[2], dtype=np.int32)
    chunk = ChunkKV(token_ids, torch.randn(SHAPE, dtype=torch.float32).to(dtype))
    groups = [RAW.encode_group(part) for part in chunk.kv.split(GROUP, dim=2)]
    return b"".join(bytes(part) for part in pack(header_of(token_ids, dtype), token_ids, groups)), chunk


def index_of(data: bytes) -> ObjectIndex:
    index = open_index(memoryview(data))
    assert not isinstance(index, int)
    return index


def streams(stored: StoredObject) -> list[list[bytes]]:
    groups, layers, _ = stored.coded.places.shape
    return [[bytes(stored.coded.stream(group, layer)) for layer in range(layers)] for group in range(groups)]


def kv_of(stored: StoredObject, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """All tokens that are there."""
    return RAW.decode(stored.coded, *SHAPE[3:], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_raw_is_lossless(dtype: torch.dtype) -> None:
    data, chunk = packed(dtype)
    stored = unpack(memoryview(bytearray(data)))
    assert stored.token_ids.tolist() == chunk.token_ids.tolist()
    assert torch.equal(kv_of(stored, dtype), chunk.kv)


def test_streams_start_at_multiples_of_4_bytes() -> None:
    data, chunk = packed(torch.bfloat16)
    for part in chunk.kv.split(GROUP, dim=2):
        for layer in part:
            assert data.index(layer.contiguous().view(torch.uint8).numpy().tobytes()) % 4 == 0


def test_streams_of_any_length_come_back() -> None:
    token_ids = np.arange(20, dtype=np.int32)
    put = [[b"", b"abc", b"a" * 5], [b"", b"", b""], [b"x" * 4, b"yz", b"\0"]]
    data = b"".join(pack(header_of(token_ids), token_ids, put))
    assert len(data) % 4 == 0
    assert streams(unpack(memoryview(data))) == put


@pytest.mark.parametrize("lengths", [(12, 12, 12), (1280, 1280, 1276), (1280, 1280, 1284)])
def test_raw_refuses_streams_of_another_shape(lengths: tuple[int, ...]) -> None:
    token_ids = np.arange(20, dtype=np.int32)
    data = b"".join(pack(header_of(token_ids, group=20), token_ids, [[bytes(length) for length in lengths]]))
    with pytest.raises(CorruptObjectError, match="must have 1280 bytes"):
        kv_of(unpack(memoryview(data)))


def test_the_index_is_read_from_the_first_bytes() -> None:
    data, chunk = packed()
    have = 0
    for _ in range(4):
        found = open_index(memoryview(data)[:have])
        if not isinstance(found, int):
            break
        assert found > have
        have = found
    assert isinstance(found, ObjectIndex)
    assert found.token_ids.tolist() == chunk.token_ids.tolist()
    assert have < len(data) / 2


@pytest.mark.parametrize(
    ("offset", "length", "held"),
    [(0, 20, (0, 20)), (0, 8, (0, 8)), (7, 2, (0, 16)), (16, 1, (16, 20)), (19, 1, (16, 20))],
)
def test_some_tokens_are_one_range_of_bytes(offset: int, length: int, held: tuple[int, int]) -> None:
    data, chunk = packed()
    index = index_of(data)
    begin, end = index.range_of(offset, length)
    part = unpack_range(index, offset, length, memoryview(bytearray(data[begin:end])))
    assert torch.equal(kv_of(part), chunk.kv[:, :, slice(*held)])
    assert index.size == len(data)
    for wrong in (data[begin : end - 1], data[begin:end] + b"\0", data[begin + 4 : end], b""):
        with pytest.raises(CorruptObjectError, match="cut short"):
            unpack_range(index, offset, length, memoryview(wrong))


@pytest.mark.parametrize(("offset", "length"), [(-1, 3), (0, 0), (0, 21), (20, 1), (5, 16)])
def test_tokens_that_there_are_not(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="of a chunk of 20"):
        index_of(packed()[0]).range_of(offset, length)


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_flipped_bit_is_found_in_the_group_that_has_it(data: st.DataObject) -> None:
    original, _ = packed()
    index = index_of(original)
    at = data.draw(st.integers(int(index.starts[0]), len(original) - 1))
    flipped = bytearray(original)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    for group in range(3):
        offset, length = group * GROUP, min(GROUP, 20 - group * GROUP)
        begin, end = index.range_of(offset, length)
        if begin <= at < end:
            with pytest.raises(CorruptObjectError, match=f"group {group} has a wrong checksum"):
                unpack_range(index, offset, length, memoryview(flipped)[begin:end])
        else:
            unpack_range(index, offset, length, memoryview(flipped)[begin:end])


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
    with pytest.raises(CorruptObjectError):
        unpack(memoryview(flipped))


@given(junk=st.binary(max_size=300))
@settings(deadline=None, max_examples=200)
def test_hostile_bytes_are_corrupt(junk: bytes) -> None:
    for data in (junk, b"LMCRAGKV" + junk, b"LMCRAGKV\x03\x00\x00\x00" + junk):
        with pytest.raises(CorruptObjectError):
            unpack(memoryview(data))


def hostile(
    json: bytes, parts: list[tuple[int, int]], rest: bytes = b"", *, json_length: int | None = None
) -> memoryview:
    """An object with a right checksum of its header, whatever that says."""
    text = json + struct.pack("<" + "QQ" * len(parts), *(number for part in parts for number in part))
    prefix = struct.pack("<8sIIII", b"LMCRAGKV", 3, len(json) if json_length is None else json_length, len(parts), 0)
    return memoryview(prefix + struct.pack("<Q", xxhash.xxh3_64_intdigest(prefix + text)) + text + rest)


def test_a_header_of_deeply_nested_json_is_corrupt() -> None:
    with pytest.raises(CorruptObjectError, match="header cannot be read"):
        unpack(hostile(b"[" * 60_000, [(80, 0)]))
    with pytest.raises(CorruptObjectError, match="impossibly long"):
        unpack(hostile(b"[" * 100_000, [(80, 0)]))


@pytest.mark.parametrize(
    "lengths",
    [
        [80, 12, 12],  # a group too few
        [80, 12, 12, 12, 12],
        [84, 12, 12, 12],  # not that many tokens
        [80, 1 << 63, 1 << 63, 12],  # which add up to nothing in 64 bits
        [80, (1 << 64) - 4, 16, 12],
        [80, 8, 12, 12],  # no room for the lengths of its layers
        [80, 13, 12, 12],
    ],
)
def test_lengths_that_contradict_the_header_are_corrupt(lengths: list[int]) -> None:
    token_ids = np.arange(20, dtype=np.int32)
    json = header_of(token_ids).model_dump_json().encode()
    parts = [(length, xxhash.xxh3_64_intdigest(token_ids.tobytes())) for length in lengths]
    with pytest.raises(CorruptObjectError, match="contradicts itself"):
        unpack(hostile(json, parts, token_ids.tobytes() + bytes(100)))


def test_a_chunk_that_claims_to_be_huge_allocates_nothing() -> None:
    token_ids = np.arange(20, dtype=np.int32)
    json = header_of(token_ids, tokens=(1 << 24) - 1, group=1 << 24, layers=4095).model_dump_json().encode()
    data = hostile(json, [(4 * ((1 << 24) - 1), 0), (1 << 40, 0)])
    assert open_index(data) == len(data) + 4 * ((1 << 24) - 1)  # bytes that are not there, which whoever reads finds
    with pytest.raises(CorruptObjectError, match="cut short"):
        unpack(data)


@pytest.mark.parametrize("lengths", [(0, 0, 4), (8, 0, 0), (0xFFFFFFFF, 0, 0), (0xFFFFFFFC, 4, 4)])
def test_streams_that_do_not_fill_their_group_are_corrupt(lengths: tuple[int, int, int]) -> None:
    token_ids = np.arange(20, dtype=np.int32)
    json = header_of(token_ids, group=20).model_dump_json().encode()
    group = struct.pack("<III", *lengths)
    contents = [token_ids.tobytes(), group]
    parts = [(len(content), xxhash.xxh3_64_intdigest(content)) for content in contents]
    with pytest.raises(CorruptObjectError, match="group 0 contradicts itself"):
        unpack(hostile(json, parts, b"".join(contents)))


def test_another_version_says_so() -> None:
    for version in (2, 9):
        data = bytearray(packed()[0])
        data[8] = version
        with pytest.raises(CorruptObjectError, match=f"format version {version}, this release reads 3"):
            unpack(memoryview(data))
