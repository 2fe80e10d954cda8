"""The entropy coder: what goes in comes out, in every version alike, near the entropy; other bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmcache_rag_kernels import rans
from lmcache_rag_kernels.rans import cpu, reference

LARGEST = 20
SCALES = (0.2, 1.0, 5.0)
needs_compiler = pytest.mark.skipif(not cpu.compiled(), reason="installed without a C++ compiler")


def laplace() -> rans.Distributions:
    symbol = np.arange(-LARGEST, LARGEST + 1)
    rows = []
    for scale in SCALES:
        share = np.exp(-np.abs(symbol) / scale)
        row = np.append(np.floor(share / share.sum() * 4000), 1).astype(np.uint16)
        row[LARGEST] += 4096 - row.sum()
        rows.append(row)
    return rans.Distributions(np.stack(rows))


DISTRIBUTIONS = laplace()
VERSIONS = ["reference", *(cpu.instruction_sets() if cpu.compiled() else [])]


def matrix(columns: int, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    distribution = draw.integers(0, len(SCALES), columns).astype(np.uint8)
    scale = np.array(SCALES)[distribution][:, None]
    return np.rint(draw.laplace(size=(columns, rows)) * scale).astype(np.int16), distribution


def encoded(symbols: np.ndarray, distribution: np.ndarray) -> bytes:
    """All rows in one stream."""
    [stream] = rans.encode(torch.from_numpy(symbols), distribution, DISTRIBUTIONS, symbols.shape[1])
    return stream


def decoded(version: str, data: bytes, distribution: np.ndarray, rows: int) -> np.ndarray | None:
    out = np.full((len(distribution), rows), np.nan, np.float32)
    arguments = (np.frombuffer(data, np.uint8), distribution, DISTRIBUTIONS.slots, 2 * LARGEST + 2, out)
    fits = reference.decode(*arguments) if version == "reference" else cpu.decode(*arguments, isa=version)
    return out if fits else None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (7, 15), (7, 16), (40, 17), (3, 100), (90, 64)])
def test_decoding_gives_what_was_encoded(version: str, columns: int, rows: int) -> None:
    symbols, distribution = matrix(columns, rows)
    symbols[0, 0], symbols[-1, -1] = -32768, LARGEST + 1  # escapes
    data = encoded(symbols, distribution)
    assert np.array_equal(decoded(version, data, distribution, rows), symbols)


@pytest.mark.parametrize("version", VERSIONS)
def test_integers_that_all_are_escapes_come_back(version: str) -> None:
    symbols = np.random.default_rng(0).integers(-32768, 32768, (50, 40)).astype(np.int16)
    distribution = np.zeros(50, np.uint8)
    assert np.array_equal(decoded(version, encoded(symbols, distribution), distribution, 40), symbols)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65, 200])
def test_each_group_is_decoded_without_the_others(version: str, rows: int) -> None:
    symbols, distribution = matrix(30, rows)
    symbols[::7, ::5] = 300  # escapes
    streams = rans.encode(torch.from_numpy(symbols), distribution, DISTRIBUTIONS, 64)
    assert len(streams) == -(-rows // 64)
    for stream, row in zip(streams, range(0, rows, 64), strict=True):
        own = symbols[:, row : row + 64]
        assert np.array_equal(decoded(version, stream, distribution, own.shape[1]), own)
        assert decoded(version, stream, distribution, own.shape[1] + 1) is None


@needs_compiler
@pytest.mark.parametrize("group", [1, 16, 20, 64])
def test_both_encoders_write_the_same_bytes(group: int) -> None:
    symbols, distribution = matrix(30, 50)
    symbols[::7, ::5] = 300  # escapes
    assert rans.encode(torch.from_numpy(symbols), distribution, DISTRIBUTIONS, group) == [
        reference.encode(symbols[:, row : row + group], distribution, DISTRIBUTIONS.frequencies)
        for row in range(0, 50, group)
    ]


def test_without_a_compiler_numpy_codes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu, "_rans", None)
    rans._say_not_compiled.cache_clear()
    symbols, distribution = matrix(5, 20)
    for data, row in zip(rans.encode(torch.from_numpy(symbols), distribution, DISTRIBUTIONS, 16), (0, 16), strict=True):
        own = symbols[:, row : row + 16]
        out = rans.decode(memoryview(data), distribution, DISTRIBUTIONS, own.shape[1])
        assert out is not None
        assert np.array_equal(out.numpy(), own)
    assert caplog.text.count("entropy coder is not compiled") == 1


def test_the_length_is_near_the_entropy() -> None:
    symbols, distribution = matrix(300, 256)
    data = encoded(symbols, distribution)
    index = np.where(np.abs(symbols) <= LARGEST, symbols + LARGEST, 2 * LARGEST + 1)
    share = DISTRIBUTIONS.frequencies[distribution[:, None], index] / 4096
    escapes = int((np.abs(symbols) > LARGEST).sum())
    assert len(data) < 1.01 * -np.log2(share).sum() / 8 + 2 * escapes + 100


@pytest.mark.parametrize("version", VERSIONS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_other_bytes_are_refused_or_decoded_within_bounds(version: str, data: st.DataObject) -> None:
    symbols, distribution = matrix(60, 100)
    right = bytearray(reference.encode(symbols, distribution, DISTRIBUTIONS.frequencies))
    match data.draw(st.sampled_from(["cut", "flip", "any"])):
        case "cut":
            wrong = right[: data.draw(st.integers(0, len(right) - 1))]
        case "flip":
            wrong = bytearray(right)
            wrong[data.draw(st.integers(0, len(right) - 1))] ^= data.draw(st.integers(1, 255))
        case _:
            wrong = bytearray(data.draw(st.binary(max_size=3000)))
    out = decoded(version, bytes(wrong), distribution, 100)  # neither crashes nor reads past the end
    if len(wrong) < len(right):
        assert out is None
    assert out is None or np.isfinite(out).all()


@pytest.mark.parametrize("spoil", ["odd", "sum", "no escape"])
def test_impossible_frequencies_are_refused(spoil: str) -> None:
    frequencies = DISTRIBUTIONS.frequencies.copy()
    match spoil:
        case "odd":
            frequencies = frequencies[:, 1:]
        case "sum":
            frequencies[0, 0] += 1
        case _:
            frequencies[0, LARGEST] += frequencies[0, -1]
            frequencies[0, -1] = 0
    symbols, distribution = matrix(2, 3)
    wrong = rans.Distributions(np.ascontiguousarray(frequencies))
    with pytest.raises(ValueError, match=r"even number|add up"):
        rans.encode(torch.from_numpy(symbols), distribution, wrong, 16)
    with pytest.raises(ValueError, match=r"even number|add up"):
        _ = wrong.slots


@needs_compiler
def test_other_dtypes_are_not_converted() -> None:
    symbols, distribution = matrix(2, 3)
    with pytest.raises(TypeError):
        cpu.encode(symbols.astype(np.int32), distribution, DISTRIBUTIONS.frequencies, 16)
    data = encoded(symbols, distribution)
    with pytest.raises(TypeError):
        cpu.decode(np.frombuffer(data, np.uint8), distribution, DISTRIBUTIONS.slots, 42, np.empty((2, 3)))
