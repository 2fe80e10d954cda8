"""Restoring: the C++ versions do what the reference does, on parts and views too, and refuse what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lmcache_rag_kernels import Rotation, Transform, rans
from lmcache_rag_kernels.rans import Distributions
from lmcache_rag_kernels.restore import cpu, reference, restore

LAYERS, TOKENS, START = 3, 37, 5
COUNTS = np.array([[20, 11], [0, 24], [7, 0]], dtype=np.int64)

VERSIONS = cpu.instruction_sets() if cpu._restore is not None else []


def rotation(dim: int) -> Rotation:
    angles = torch.outer(torch.arange(64).float(), 100.0 ** (-torch.arange(0, dim, 2).float() / dim))
    return Rotation(angles.cos(), angles.sin())


def coded(heads: int, size: int) -> tuple[list[memoryview], Transform]:
    """Streams of all layers, some coordinates large enough to be escaped."""
    draw = np.random.default_rng(0)
    weights = np.exp(-np.abs(np.arange(-20, 21)) / 3.0)
    frequencies = np.floor(np.append(weights / weights.sum(), 0.001) * 4000).astype(np.uint16)
    frequencies[20] += 4096 - frequencies.sum()
    distributions = Distributions(frequencies[None])
    total = int(COUNTS.sum())
    transform = Transform(
        COUNTS,
        np.zeros(total, np.uint8),
        torch.from_numpy(draw.normal(size=(total, heads * size)).astype(np.float32)),
        torch.from_numpy(draw.normal(size=(LAYERS, 2, heads * size)).astype(np.float32)),
        distributions,
    )
    streams = []
    for count in COUNTS.sum(1):
        symbols = np.rint(draw.laplace(scale=4, size=(count, TOKENS))).astype(np.int16)
        streams.append(memoryview(rans.encode(torch.from_numpy(symbols), np.zeros(count, np.uint8), distributions)))
    return streams, transform


@pytest.mark.parametrize("isa", VERSIONS)
@pytest.mark.parametrize(("heads", "size"), [(2, 8), (3, 64), (1, 37), (5, 6)])
@pytest.mark.parametrize(("offset", "length"), [(0, TOKENS), (0, 1), (16, 16), (3, 30), (36, 1), (7, 0)])
def test_as_the_reference(isa: str, heads: int, size: int, offset: int, length: int) -> None:
    streams, transform = coded(heads, size)
    rotations = [rotation(size - size % 2), None, rotation(4)]
    expected, found = torch.zeros(2, 2, LAYERS, 64, heads, size)
    for run, into in ((reference.restore, expected), (cpu.restore, found)):
        options = {"isa": isa} if run is cpu.restore else {}
        key, value = into[:, :, 9 : 9 + length]  # views of something larger, as a workspace's
        assert run(streams, transform, TOKENS, offset, rotations, START, key, value, **options) is None
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    assert not found[:, :, :9].any() and not found[:, :, 9 + length :].any()


def test_other_types_and_rotations_take_the_reference() -> None:
    streams, transform = coded(2, 8)
    whole = rotation(8)
    interleaved = Rotation(whole.cos, whole.sin, interleaved=True)
    for dtype, rotations in ((torch.bfloat16, [whole] * LAYERS), (torch.float32, [interleaved] * LAYERS)):
        key, value = torch.zeros(2, LAYERS, TOKENS, 2, 8, dtype=dtype)
        assert restore(streams, transform, TOKENS, 0, rotations, START, key, value) is None
        assert key[0].any() and value[1].any()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stream_that_does_not_fit_is_named(threads: int) -> None:
    streams, transform = coded(2, 8)
    key, value = torch.zeros(2, LAYERS, TOKENS, 2, 8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for wrong in (streams[1][:-2], memoryview(bytes(streams[1]) + b"\0\0"), memoryview(b""), streams[0]):
            broken = [streams[0], wrong, streams[2]]
            assert restore(broken, transform, TOKENS, 0, [None] * LAYERS, START, key, value) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not VERSIONS, reason="the extension is not compiled")
def test_arguments_that_do_not_fit_are_refused() -> None:
    streams, transform = coded(2, 8)
    key, value = torch.zeros(2, LAYERS, TOKENS, 2, 8)
    nothing = [None] * LAYERS
    with pytest.raises(ValueError, match="among those stored"):
        cpu.restore(streams, transform, TOKENS, 1, nothing, START, key, value)
    with pytest.raises(ValueError, match="one row for each token"):
        cpu.restore(streams, transform, TOKENS, 0, [rotation(8)] * LAYERS, 40, key, value)
    with pytest.raises(ValueError, match=r"counts must be \[layers, 2\]"):
        cpu.restore(streams[:2], transform, TOKENS, 0, nothing[:2], START, key[:2], value[:2])
    with pytest.raises(ValueError, match="must be"):
        cpu.restore(streams, coded(2, 7)[1], TOKENS, 0, nothing, START, key, value)
    with pytest.raises(ValueError, match="lie in a row"):
        cpu.restore(streams, transform, TOKENS, 0, nothing, START, key.mT, value.mT)
