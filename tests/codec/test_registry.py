"""Every name: what comes back is near what went in, nearer at a higher name, and wrong bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmcache_rag_kernels import CodedGroups, Rotation, Rows, rotate

from lmcache_rag.chunk_kv import NO_CONTEXT, ChunkKV, KVScope
from lmcache_rag.codec import CODECS, Codec, StoredObject, codec_named, open_index, unpack, unpack_range
from lmcache_rag.codec.tables import CodecTables, learn_tables
from lmcache_rag.errors import CorruptObjectError
from lmcache_rag.library.chunks import coded

LAYERS, HEADS, SIZE = 3, 2, 8
UNLEARNED = [name for name in CODECS if not CODECS[name].learned]


def sample(tokens: int, seed: int) -> torch.Tensor:
    """KV `[layers, 2, tokens, heads, size]` of channels that differ in mean and spread."""
    draw = torch.Generator().manual_seed(seed)
    channels = torch.Generator().manual_seed(9)
    mean = 4 * torch.randn(LAYERS, 2, 1, HEADS, SIZE, generator=channels)
    spread = torch.rand(LAYERS, 2, 1, HEADS, SIZE, generator=channels) + 0.1
    return mean + spread * torch.randn(LAYERS, 2, tokens, HEADS, SIZE, generator=draw)


@pytest.fixture(scope="module")
def tables() -> CodecTables:
    return learn_tables(sample(3000, 1).flatten(3), torch.eye(HEADS * SIZE).expand(LAYERS, 2, 1, -1, -1))


def stored(codec: Codec, name: str, kv: torch.Tensor) -> memoryview:
    """The whole object."""
    chunk = ChunkKV(np.arange(kv.shape[2], dtype=np.int32), kv)
    _, parts = coded(chunk, KVScope("default", "m" * 32), NO_CONTEXT, name, codec, "")
    return memoryview(bytearray().join(parts))


def restored(codec: Codec, found: StoredObject, offset: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """`[layers, 2, length, heads, size]`, K rotated to positions from 3 + offset on."""
    angles = torch.outer(torch.arange(300).float(), torch.tensor([1.0, 0.2]))
    turns = [Rotation(angles.cos(), angles.sin())] * LAYERS
    key, value = torch.zeros(2, LAYERS, length, HEADS, SIZE, dtype=dtype)
    codec.restore(found.coded, offset, Rows(key, value, 3 + offset, turns))
    return torch.stack([key, value], dim=1)


def there_and_back(codec: Codec, kv: torch.Tensor) -> torch.Tensor:
    return codec.decode(unpack(stored(codec, "raw", kv)).coded, HEADS, SIZE, kv.dtype)


def error(codec: Codec, kv: torch.Tensor) -> float:
    """Relative to the spread around the channels' means."""
    return float((there_and_back(codec, kv) - kv).norm() / (kv - kv.mean(2, keepdim=True)).norm())


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("name", CODECS)
def test_what_comes_back_is_near_what_went_in(name: str, tokens: int, tables: CodecTables) -> None:
    kv = sample(tokens, 2)
    codec = CODECS[name].make(LAYERS, tables)
    decoded = there_and_back(codec, kv)
    assert decoded.shape == kv.shape and decoded.dtype == kv.dtype
    wrong = (decoded - kv).norm() / (kv - sample(4000, 2).mean(2, keepdim=True)).norm()
    assert float(wrong) <= {"raw": 0.0, "q8": 0.02, "q4": 0.25, "high": 0.1, "balanced": 0.15}.get(name, 0.45)


@pytest.mark.parametrize("tokens", [1, 15, 17, 63, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_a_part_is_read_and_restored_alone(name: str, dtype: torch.dtype, tokens: int, tables: CodecTables) -> None:
    codec = CODECS[name].make(LAYERS, tables)
    data = stored(codec, name, sample(tokens, 2).to(dtype))
    whole = restored(codec, unpack(data), 0, tokens, dtype)
    index = open_index(data)
    assert not isinstance(index, int)
    for offset, length in {(0, tokens), (0, 1), (tokens // 2, tokens - tokens // 2), (tokens - 1, 1)}:
        begin, end = index.range_of(offset, length)
        part = unpack_range(index, offset, length, data[begin:end])
        assert torch.equal(restored(codec, part, offset, length, dtype), whole[:, :, offset : offset + length])


@pytest.mark.parametrize("together", [1, 3000, 1 << 19])
def test_each_layer_has_its_own_rotation(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers and tokens are computed at once."""
    monkeypatch.setattr("lmcache_rag.chunk_kv.TOGETHER", together)
    monkeypatch.setattr("lmcache_rag.codec.base.TOGETHER", together)
    angles = torch.outer(torch.arange(300).float(), torch.tensor([1.0, 0.2]))
    one, other = Rotation(angles.cos(), angles.sin()), Rotation(angles.cos(), angles.sin(), interleaved=True)
    kv, offset, length, start = sample(200, 2), 30, 120, 7
    found = unpack(stored(CODECS["raw"].make(LAYERS, None), "raw", kv)).coded
    for turns in ([one, one, None], [other, None, one], [None, other, other]):
        placed, restored = torch.zeros(2, 2, LAYERS, length, HEADS, SIZE)
        ChunkKV(np.arange(200, dtype=np.int32), kv).place(offset, Rows(*placed, start=start, rotations=turns))
        CODECS["raw"].make(LAYERS, None).restore(found, offset, Rows(*restored, start=start, rotations=turns))
        expected = kv[:, :, offset : offset + length].transpose(0, 1).clone()
        for key, turn in zip(expected[0], turns, strict=True):
            if turn is not None:
                rotate(key, turn, torch.arange(start, start + length), out=key)
        assert torch.equal(placed, expected) and torch.equal(restored, expected)


@pytest.mark.parametrize("name", sorted(set(CODECS) - {"cachegen"}))
def test_half_a_chunk_is_half_the_bytes(name: str, tables: CodecTables) -> None:
    data = stored(CODECS[name].make(LAYERS, tables), name, sample(256, 2))
    index = open_index(data)
    assert not isinstance(index, int)
    begin, end = index.range_of(128, 128)
    assert end - begin < 0.52 * len(data)


def test_levels_are_in_the_order_of_their_fidelity(tables: CodecTables) -> None:
    kv = sample(256, 2)
    learned = [error(CODECS[name].make(LAYERS, tables), kv) for name in ("high", "balanced", "small")]
    assert learned == sorted(set(learned))
    raw, q8, q4 = (error(CODECS[name].make(LAYERS, tables), kv) for name in ("raw", "q8", "q4"))
    assert raw == 0 < q8 < q4 < 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CODECS)
def test_other_compute_types(name: str, dtype: torch.dtype, tables: CodecTables) -> None:
    kv = sample(40, 3).to(dtype)
    decoded = there_and_back(CODECS[name].make(LAYERS, tables), kv)
    assert decoded.dtype == dtype
    assert float((decoded.float() - kv.float()).norm() / kv.float().norm()) < 0.5


@pytest.mark.parametrize("name", ["q8", "q4", "cachegen"])
def test_what_does_not_vary_comes_back(name: str) -> None:
    kv = torch.full((LAYERS, 2, 20, HEADS, SIZE), 3.25)
    torch.testing.assert_close(there_and_back(CODECS[name].make(LAYERS, None), kv), kv, atol=0.03, rtol=0)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
@pytest.mark.parametrize("name", UNLEARNED)
def test_wrong_bytes_are_refused_or_decoded_to_the_right_shape(name: str, data: st.DataObject) -> None:
    codec = CODECS[name].make(LAYERS, None)
    stream = bytearray(codec.encode(sample(20, 1)[:1])[0][0])
    kind = data.draw(st.sampled_from(["cut", "flip", "junk"]))
    if kind == "cut":
        stream = stream[: data.draw(st.integers(0, len(stream) - 1))]
    elif kind == "flip":
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        stream = bytearray(data.draw(st.binary(max_size=2000)))
    try:
        decoded = codec.decode(
            CodedGroups(memoryview(stream), np.array([[[0, len(stream)]]]), 20, 20), HEADS, SIZE, torch.float32
        )
    except CorruptObjectError:
        return
    assert decoded.shape == (1, 2, 20, HEADS, SIZE)


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="no codec 'zip', choose from raw"):
        codec_named("zip")
