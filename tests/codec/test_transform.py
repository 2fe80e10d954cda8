"""The transform codec: errors are cheap where the metric says so, bytes are few, and wrong bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_rag.codec.tables import CodecTables, learn_tables
from lmcache_rag.codec.transform import TransformCodec
from lmcache_rag.errors import CorruptObjectError

LAYERS, HEADS, SIZE = 2, 2, 8
STEPS = (0.15, 0.26, 0.6)
WIDTH = HEADS * SIZE
SHAPE = (20, HEADS, SIZE)


def sample(tokens: int, seed: int = 0) -> torch.Tensor:
    """KV of few degrees of freedom, around a mean."""
    mixing = torch.randn(LAYERS, 2, 4, WIDTH, generator=torch.Generator().manual_seed(7))
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(LAYERS, 2, tokens, 4, generator=draw)
    return 3 + hidden @ mixing + 0.05 * torch.randn(LAYERS, 2, tokens, WIDTH, generator=draw)


@pytest.fixture(scope="module")
def fisher() -> torch.Tensor:
    """Errors in the first half of the channels cost a hundred times as much."""
    return torch.diag(torch.tensor([10.0] * (WIDTH // 2) + [0.1] * (WIDTH // 2))).expand(LAYERS, 2, -1, -1)


@pytest.fixture(scope="module")
def tables(fisher: torch.Tensor) -> CodecTables:
    return learn_tables(sample(4000), fisher)


def coded(codec: TransformCodec, kv: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What comes back, and the number of bytes."""
    shape = (kv.shape[2], HEADS, SIZE)
    streams = [codec.encode_layer(layer, kv[layer].view(2, *shape)) for layer in range(LAYERS)]
    decoded = [codec.decode_layer(layer, stream, shape, kv.dtype) for layer, stream in enumerate(streams)]
    return torch.stack(decoded).view(kv.shape), sum(map(len, streams))


@pytest.mark.parametrize("step", STEPS)
def test_errors_are_of_the_size_of_the_step_where_they_cost(
    tables: CodecTables, fisher: torch.Tensor, step: float
) -> None:
    kv = sample(256, seed=1)
    error = coded(TransformCodec(tables, step), kv)[0] - kv
    cost = torch.einsum("lptc,lpcd,lptd->lpt", error, fisher / fisher[0, 0].trace() * WIDTH, error).mean() / WIDTH
    assert cost <= step**2 / 12
    cheap, dear = error[..., WIDTH // 2 :].pow(2).mean(), error[..., : WIDTH // 2].pow(2).mean()
    assert cheap > 1.5 * dear


def test_a_larger_step_takes_fewer_bytes(tables: CodecTables) -> None:
    kv = sample(256, seed=1)
    sizes = [coded(TransformCodec(tables, step), kv)[1] for step in STEPS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < kv.numel() * 2 / 3


def test_what_is_far_outside_the_sample_comes_back_too(tables: CodecTables) -> None:
    kv = sample(3, seed=2) * 200
    decoded, _ = coded(TransformCodec(tables, 0.1), kv)
    assert (decoded - kv).abs().max() < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tables: CodecTables, dtype: torch.dtype) -> None:
    kv = sample(20, seed=3).to(dtype)
    decoded, _ = coded(TransformCodec(tables, 0.26), kv)
    assert decoded.dtype == dtype
    assert (decoded - kv).float().abs().mean() < 0.5


def test_errors_shrink_nothing(tables: CodecTables) -> None:
    kv = sample(4000, seed=4)
    centred, decoded = kv - 3, coded(TransformCodec(tables, 1.0), kv)[0] - 3
    assert (decoded * centred).sum() / centred.pow(2).sum() > 0.995  # with a dead zone of 0.6: 0.978


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_wrong_bytes_are_refused_or_decoded_to_the_right_shape(tables: CodecTables, data: st.DataObject) -> None:
    codec = TransformCodec(tables, 0.26)
    stream = bytearray(codec.encode_layer(0, sample(20)[0].view(2, *SHAPE)))
    match data.draw(st.sampled_from(["cut", "flip", "any"])):
        case "cut":
            stream = stream[: data.draw(st.integers(0, len(stream) - 1))]
        case "flip":
            stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
        case _:
            stream = bytearray(data.draw(st.binary(max_size=400)))
    try:
        decoded = codec.decode_layer(0, memoryview(stream), SHAPE, torch.float32)
    except CorruptObjectError:
        return
    assert decoded.shape == (2, *SHAPE)


def test_tables_are_read_as_they_were_written(tables: CodecTables) -> None:
    again = CodecTables.from_bytes(tables.to_bytes())
    assert again.digest == tables.digest
    kv = sample(50, seed=5)
    assert torch.equal(coded(TransformCodec(again, 0.26), kv)[0], coded(TransformCodec(tables, 0.26), kv)[0])


@pytest.mark.parametrize("spoil", ["cut", "missing", "shape", "frequencies", "flat", "dtype", "nan"])
def test_spoilt_tables_are_refused(tables: CodecTables, spoil: str) -> None:
    data = tables.to_bytes()
    arrays = safetensors.numpy.load(data)
    match spoil:
        case "cut":
            data = data[:-10]
        case "missing":
            del arrays["size"]
        case "shape":
            arrays["mean"] = arrays["mean"][:1]
        case "flat":
            arrays["frequencies"] = arrays["frequencies"].flatten()
        case "nan":
            arrays["mean"][0, 0, 0] = np.nan
        case "frequencies":
            arrays["frequencies"] = np.zeros_like(arrays["frequencies"])
        case _:
            arrays["backward"] = arrays["backward"].astype(np.float64)
    with pytest.raises(CorruptObjectError, match="codec tables"):
        CodecTables.from_bytes(data if spoil == "cut" else safetensors.numpy.save(arrays))
