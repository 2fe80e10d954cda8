"""Restoring: the C++ versions do what the reference does, on parts and views too, and refuse what does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from lmcache_rag_kernels import CodedGroups, Rotation, Rows, Transform, rans
from lmcache_rag_kernels.rans import Distributions
from lmcache_rag_kernels.restore import cpu, reference, restore

LAYERS, TOKENS, GROUP, START = 3, 37, 16, 5
NOTHING = [None] * LAYERS

VERSIONS = cpu.instruction_sets() if cpu._restore is not None else []
SHAPES = [(2, 8, 1), (3, 64, 3), (1, 37, 1), (6, 6, 3)]
"""Heads, their size, and into how many groups they are divided."""

PARTS = [(0, TOKENS), (0, 1), (16, 16), (3, 30), (36, 1), (7, 0)]
"""From which token, and how many."""


def rotation(dim: int) -> Rotation:
    angles = torch.outer(torch.arange(64).float(), 100.0 ** (-torch.arange(0, dim, 2).float() / dim))
    return Rotation(angles.cos(), angles.sin())


def transform_of(heads: int, size: int, head_groups: int) -> Transform:
    """Some coordinates of each layer are stored; of layer 1's K none."""
    draw = np.random.default_rng(0)
    weights = np.exp(-np.abs(np.arange(-20, 21)) / 3.0)
    frequencies = np.floor(np.append(weights / weights.sum(), 0.001) * 4000).astype(np.uint16)
    frequencies[20] += 4096 - frequencies.sum()
    width = heads * size // head_groups
    counts = draw.integers(0, width + 1, (LAYERS, 2, head_groups))
    counts[1, 0] = 0
    return Transform(
        counts,
        np.zeros(counts.sum(), np.uint8),
        torch.from_numpy(draw.normal(size=(LAYERS, 2, head_groups, width, width)).astype(np.float16)).float(),
        torch.from_numpy(draw.normal(size=(LAYERS, 2, heads * size)).astype(np.float32)),
        0.25,
        Distributions(frequencies[None]),
    )


def in_groups(streams: list[list[bytes]], tokens: int, group: int) -> CodedGroups:
    """From the streams `[groups][layers]`, at even places as in a stored object."""
    lengths = np.array([[len(stream) for stream in layers] for layers in streams])
    ends = np.cumsum(lengths + lengths % 2).reshape(lengths.shape)
    data = b"".join(stream + bytes(len(stream) % 2) for layers in streams for stream in layers)
    return CodedGroups(memoryview(data), np.stack([ends - lengths - lengths % 2, lengths], -1), tokens, group)


def coded_streams(transform: Transform, tokens: int = TOKENS, group: int = GROUP) -> list[list[bytes]]:
    """`[groups][layers]`, some coordinates large enough to be escaped."""
    draw = np.random.default_rng(1)
    layers = []
    for count in transform.counts.sum((1, 2)):
        symbols = np.rint(draw.laplace(scale=4, size=(count, tokens))).astype(np.int16)
        layers.append(rans.encode(torch.from_numpy(symbols), np.zeros(count, np.uint8), transform.distributions, group))
    return [list(streams) for streams in zip(*layers, strict=True)]


def coded(
    heads: int, size: int, head_groups: int = 1, tokens: int = TOKENS, group: int = GROUP
) -> tuple[CodedGroups, Transform]:
    transform = transform_of(heads, size, head_groups)
    return in_groups(coded_streams(transform, tokens, group), tokens, group), transform


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", VERSIONS)
@pytest.mark.parametrize(("heads", "size", "head_groups"), SHAPES)
@pytest.mark.parametrize(("offset", "length"), PARTS)
def test_as_the_reference(isa: str, heads: int, size: int, head_groups: int, offset: int, length: int) -> None:
    groups, transform = coded(heads, size, head_groups)
    rotations = [rotation(size - size % 2), None, rotation(4)]
    expected, found = torch.zeros(2, 2, LAYERS, 64, heads, size)
    for run, into in ((reference.restore, expected), (cpu.restore, found)):
        options = {"isa": isa} if run is cpu.restore else {}
        key, value = into[:, :, 9 : 9 + length]  # views of something larger, as a workspace's
        assert run(groups, transform, offset, Rows(key, value, START, rotations), **options) is None
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    assert not found[:, :, :9].any() and not found[:, :, 9 + length :].any()


def residual_of(transform: Transform) -> tuple[CodedGroups, Transform]:
    """In the same directions, of other coordinates, and around a mean of its own."""
    draw = np.random.default_rng(2)
    counts = draw.integers(0, transform.directions.shape[3] + 1, transform.counts.shape)
    counts[0, 1] = 0
    residual = dataclasses.replace(
        transform,
        counts=counts,
        distribution=np.zeros(counts.sum(), np.uint8),
        mean=torch.randn_like(transform.mean),
        step=0.125,
    )
    return in_groups(coded_streams(residual), TOKENS, GROUP), residual


def of_each_added(
    first: tuple[CodedGroups, Transform], second: tuple[CodedGroups, Transform], offset: int, rows: Rows
) -> None:
    """By the reference, one after the other."""
    for coded_groups, transform in (first, second):
        key, value = torch.zeros(2, *rows.key.shape)
        own = dataclasses.replace(rows, key=key, value=value)
        assert reference.restore(coded_groups, transform, offset, own) is None
        rows.key.add_(key)
        rows.value.add_(value)


@pytest.mark.parametrize("isa", VERSIONS)
@pytest.mark.parametrize(("heads", "size", "head_groups"), SHAPES)
@pytest.mark.parametrize(("offset", "length"), PARTS)
def test_a_sum_takes_one_pass(isa: str, heads: int, size: int, head_groups: int, offset: int, length: int) -> None:
    first = coded(heads, size, head_groups)
    second = residual_of(first[1])
    rotations = [rotation(size - size % 2), None, rotation(4)]
    expected, found = torch.zeros(2, 2, LAYERS, length, heads, size)
    of_each_added(first, second, offset, Rows(*expected, START, rotations))
    assert cpu.restore(*first, offset, Rows(*found, START, rotations), second, isa=isa) is None
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("how", ["alike", "other directions", "other groups", "another type"])
def test_a_sum_of_any_two(how: str) -> None:
    first = coded(2, 8)
    second = residual_of(first[1])
    if how == "other directions":
        second = second[0], dataclasses.replace(second[1], directions=second[1].directions.clone() / 2)
    if how == "other groups":
        second = in_groups(coded_streams(second[1], TOKENS, 8), TOKENS, 8), second[1]
    dtype = torch.float64 if how == "another type" else torch.float32
    rotations = [rotation(8), None, rotation(4)]
    expected, found = torch.zeros(2, 2, LAYERS, 30, 2, 8, dtype=dtype)
    of_each_added(first, second, 3, Rows(*expected, START, rotations))
    assert restore(*first, 3, Rows(*found, START, rotations), second) is None
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("damaged", [0, 1])
def test_a_sum_of_which_one_is_damaged(damaged: int, alike: bool) -> None:
    first = coded(2, 8)
    both = [first, residual_of(first[1])]
    if not alike:
        both[1] = both[1][0], dataclasses.replace(both[1][1], directions=both[1][1].directions.clone())
    groups, transform = both[damaged]
    places = groups.places.copy()
    places[1, 2, 1] -= 2
    both[damaged] = dataclasses.replace(groups, places=places), transform
    key, value = torch.zeros(2, LAYERS, TOKENS, 2, 8)
    assert restore(*both[0], 0, Rows(key, value, START, NOTHING), both[1]) == 2


@pytest.mark.parametrize("isa", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "size", "head_groups"), SHAPES)
def test_narrower_types_are_float32_rounded(
    isa: str, dtype: torch.dtype, heads: int, size: int, head_groups: int
) -> None:
    groups, transform = coded(heads, size, head_groups)
    rotations = [rotation(size - size % 2), None, rotation(4)]
    whole, found = torch.zeros(2, LAYERS, 50, heads, size), torch.zeros(2, LAYERS, 50, heads, size, dtype=dtype)
    for key, value in (whole[:, :, 9 : 9 + TOKENS], found[:, :, 9 : 9 + TOKENS]):
        assert cpu.restore(groups, transform, 0, Rows(key, value, START, rotations), isa=isa) is None
    assert torch.equal(found, whole.to(dtype))
    assert found[:, :, 9 : 9 + TOKENS].any()


@pytest.mark.parametrize("isa", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_pytorchs(isa: str, dtype: torch.dtype) -> None:
    """Ties, what is too large, and what is too small, in a row whose end no vector register fills."""
    exact = torch.cat([torch.randn(40), torch.randn(40) * 1e-6, torch.randn(40) * 1e5]).to(dtype).float()
    bits = exact.view(torch.int32)
    ties = torch.cat([(bits + offset).view(torch.float32) for offset in (0x1000, 0x8000, 0x0FFF, 0x7FFF, 0x1001)])
    special = torch.tensor([0.0, -0.0, 65519.0, 65520.0, -7e4, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, -(2.0**-15), 1e-40])
    row = torch.cat([ties, special, torch.full((3,), 1.0)])
    row = row[row.isfinite()]
    row = torch.cat([row, row[: (5 - len(row)) % 8]])  # of a length that is no multiple of 8
    transform = dataclasses.replace(
        transform_of(1, len(row), 1),
        counts=np.zeros((1, 2, 1), np.int64),
        directions=torch.zeros(1, 2, 1, len(row), len(row)),
        mean=row.expand(1, 2, -1).contiguous(),
    )
    groups = in_groups(
        [rans.encode(torch.empty(0, 1, dtype=torch.int16), np.empty(0, np.uint8), transform.distributions, 1)], 1, 1
    )
    key, value = torch.zeros(2, 1, 1, 1, len(row), dtype=dtype)
    assert cpu.restore(groups, transform, 0, Rows(key, value, 0, [None]), isa=isa) is None
    assert torch.equal(value.flatten().view(torch.int16), row.to(dtype).view(torch.int16))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("count", [1, 2])
def test_a_part_is_the_wholes_part(tokens: int, count: int) -> None:
    groups, transform = coded(4, 8, 2, tokens, 64)
    turns = [Rotation(torch.ones(300, 4), torch.zeros(300, 4))] * LAYERS
    with threads(1):
        whole = torch.zeros(2, LAYERS, tokens, 4, 8)
        assert restore(groups, transform, 0, Rows(*whole, start=0, rotations=turns)) is None
    with threads(count):
        for offset, length in {(0, tokens), (tokens // 2, tokens - tokens // 2), (tokens - 1, 1), (tokens // 3, 1)}:
            part = torch.zeros(2, LAYERS, length, 4, 8)
            assert restore(groups, transform, offset, Rows(*part, start=0, rotations=turns)) is None
            assert torch.equal(part, whole[:, :, offset : offset + length])


@pytest.mark.parametrize("version", ["reference", *VERSIONS])
def test_only_groups_with_wanted_tokens_are_looked_at(version: str) -> None:
    groups, transform = coded(2, 8)
    spoilt = groups.places.copy()
    spoilt[[0, 2]] = 0
    partly = dataclasses.replace(groups, places=spoilt)
    alone = dataclasses.replace(groups, places=groups.places[1:2], first=1)
    options = {} if version == "reference" else {"isa": version}
    run = reference.restore if version == "reference" else cpu.restore
    expected = torch.zeros(2, LAYERS, 10, 2, 8)
    assert run(groups, transform, 20, Rows(*expected, start=START, rotations=NOTHING), **options) is None
    for some in (partly, alone):
        found = torch.zeros(2, LAYERS, 10, 2, 8)
        assert run(some, transform, 20, Rows(*found, start=START, rotations=NOTHING), **options) is None
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match="among those of the groups"):
            run(alone, transform, 15, Rows(*found, start=START, rotations=NOTHING), **options)
        with pytest.raises(ValueError, match="among those of the groups"):
            run(alone, transform, 23, Rows(*found, start=START, rotations=NOTHING), **options)


def test_other_types_and_rotations_take_the_reference() -> None:
    groups, transform = coded(2, 8)
    whole = rotation(8)
    interleaved = Rotation(whole.cos, whole.sin, interleaved=True)
    for dtype, turn in ((torch.float64, whole), (torch.float32, interleaved)):
        key, value = torch.zeros(2, LAYERS, TOKENS, 2, 8, dtype=dtype)
        assert restore(groups, transform, 0, Rows(key, value, START, [turn] * LAYERS)) is None
        assert key[0].any() and value[1].any()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_stream_that_does_not_fit_is_named(count: int, group: int) -> None:
    transform = transform_of(2, 8, 2)
    streams = coded_streams(transform)
    right = streams[group][1]
    flipped = bytearray(right)
    flipped[3] ^= 0x40
    key, value = torch.zeros(2, LAYERS, TOKENS, 2, 8)
    with threads(count):
        for wrong in (right[:-2], right[:-1], right + b"\0\0", b"", streams[group][0], bytes(flipped)):
            broken = [list(layers) for layers in streams]
            broken[group][1] = wrong
            groups = in_groups(broken, TOKENS, GROUP)
            assert restore(groups, transform, 0, Rows(key, value, START, NOTHING)) == 1
            assert reference.restore(groups, transform, 0, Rows(key, value, START, NOTHING)) == 1


@pytest.mark.parametrize("isa", VERSIONS)
@pytest.mark.parametrize("length", [TOKENS, TOKENS - 1, 33])
def test_a_stream_that_is_decoded_to_its_end_must_end_there(isa: str, length: int) -> None:
    """Though not all tokens of its last block are wanted."""
    transform = transform_of(2, 8, 1)
    streams = coded_streams(transform)
    streams[-1][1] += b"\0\0"
    key, value = torch.zeros(2, LAYERS, length, 2, 8)
    groups = in_groups(streams, TOKENS, GROUP)
    assert cpu.restore(groups, transform, 0, Rows(key, value, START, NOTHING), isa=isa) == 1
    key, value = torch.zeros(2, LAYERS, 32, 2, 8)
    assert cpu.restore(groups, transform, 0, Rows(key, value, START, NOTHING), isa=isa) is None


@pytest.mark.skipif(not VERSIONS, reason="the extension is not compiled")
def test_arguments_that_do_not_fit_are_refused() -> None:
    groups, transform = coded(2, 8)
    key, value = torch.zeros(2, LAYERS, TOKENS, 2, 8)
    whole = Rows(key, value, START, NOTHING)
    with pytest.raises(ValueError, match="among those of the groups"):
        cpu.restore(groups, transform, 1, Rows(key, value, START, NOTHING))
    with pytest.raises(ValueError, match="one row for each token"):
        cpu.restore(groups, transform, 0, Rows(key, value, 40, [rotation(8)] * LAYERS))
    with pytest.raises(ValueError, match=r"directions must be \[layers, 2, head groups"):
        fewer = dataclasses.replace(groups, places=groups.places[:, :2].copy())
        cpu.restore(fewer, transform, 0, Rows(key[:2], value[:2], START, NOTHING[:2]))
    with pytest.raises(ValueError, match=r"counts must be \[layers, 2, head groups\]"):
        cpu.restore(groups, dataclasses.replace(transform, counts=transform.counts[:2]), 0, whole)
    with pytest.raises(ValueError, match=r"places must be \[groups, layers, 2\]"):
        cpu.restore(groups, transform, 0, whole, (dataclasses.replace(groups, places=groups.places[:2]), transform))
    with pytest.raises(ValueError, match="places must be in data"):
        outside = dataclasses.replace(groups, data=groups.data[:-2])
        cpu.restore(outside, transform, 0, Rows(key, value, START, NOTHING))
    with pytest.raises(ValueError, match="coordinates that have directions"):
        more = dataclasses.replace(transform, counts=transform.counts + 17)
        cpu.restore(groups, more, 0, Rows(key, value, START, NOTHING))
    with pytest.raises(ValueError, match="must have"):
        cpu.restore(groups, coded(2, 7)[1], 0, Rows(key, value, START, NOTHING))
    with pytest.raises(ValueError, match="lie in a row"):
        cpu.restore(groups, transform, 0, Rows(key.mT, value.mT, START, NOTHING))
    with pytest.raises(ValueError, match="narrower type"):
        cpu.restore(groups, transform, 0, Rows(key, value.bfloat16(), START, NOTHING))
