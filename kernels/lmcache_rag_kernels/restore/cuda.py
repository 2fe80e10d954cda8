"""The Triton version, for CUDA. Coded bytes go to the device, an eighth of what they become there.

Two kernels: entropy decoding, a layer a program, since a layer's stream is one chain of sixteen states; then, a head of
a few tokens a program, the inverse transform and the rotation, straight to where K and V belong.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lmcache_rag_kernels.rans.reference import HEADER_BYTES, LANES, LOWEST
from lmcache_rag_kernels.rope import Rotation

if TYPE_CHECKING:
    from lmcache_rag_kernels.restore import Transform

_BLOCK_TOKENS = 16
_BLOCK_COORDINATES = 32


def fits(key: Tensor, rotations: Sequence[Rotation | None]) -> bool:
    """Whether it is for tensors like these."""
    kinds = {(rotation.rotary_dim, rotation.interleaved) for rotation in rotations if rotation is not None}
    return key.is_cuda and len(kinds) <= 1


def restore(
    streams: Sequence[memoryview],
    transform: Transform,
    tokens: int,
    offset: int,
    rotations: Sequence[Rotation | None],
    start: int,
    key: Tensor,
    value: Tensor,
) -> int | None:
    """See `lmcache_rag_kernels.restore.restore`."""
    opened = [_opened(stream) for stream in streams]
    broken = next((layer for layer, stream in enumerate(opened) if stream is None), None)
    if broken is not None:
        return broken
    layers, length, heads, size = key.shape
    tables = _on_device(transform, key.device)
    symbols = torch.empty(len(transform.distribution), tokens, dtype=torch.int16, device=key.device)
    fits = torch.empty(layers, dtype=torch.int32, device=key.device)
    body = [np.frombuffer(stream, "<i2", offset=HEADER_BYTES) for stream in streams]
    ends = np.cumsum([len(words) for words in body])
    escapes = ends - [stream.escapes for stream in opened if stream is not None]
    begin = np.concatenate([[0], ends[:-1]])
    places = torch.from_numpy(np.stack([begin, escapes, ends])).to(key.device)
    states = torch.from_numpy(np.stack([stream.states for stream in opened if stream is not None])).to(key.device)
    words = torch.from_numpy(np.concatenate([*body, np.zeros(1, "<i2")])).to(key.device)
    largest = (transform.distributions.frequencies.shape[1] - 2) // 2
    _decode[(layers,)](
        words, places, states, tables.first, tables.distribution, tables.slots, symbols, fits, tokens, layers, largest,
        LANES=LANES, LOWEST=LOWEST,
    )  # fmt: skip
    failed = (fits == 0).nonzero().flatten()
    if len(failed):
        return int(failed[0])
    turns, which = _angles(rotations, start, length, key.device)
    grid = (layers * 2, heads, triton.cdiv(length, _BLOCK_TOKENS))
    interleaved = any(rotation is not None and rotation.interleaved for rotation in rotations)
    _place[grid](
        symbols, tables.first, tables.counts, tables.directions, tables.mean, turns, which, key, value,
        tokens, offset, length, heads, size, turns.shape[3],
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        INTERLEAVED=interleaved, SIZE=max(16, triton.next_power_of_2(size)),
        BLOCK_TOKENS=_BLOCK_TOKENS, BLOCK_COORDINATES=_BLOCK_COORDINATES,
    )  # fmt: skip
    return None


class _Opened(NamedTuple):
    """What a stream's first bytes say."""

    states: np.ndarray
    escapes: int


class _Tables(NamedTuple):
    """A transform on a device; `first` is each layer's first coordinate."""

    first: Tensor
    counts: Tensor
    distribution: Tensor
    slots: Tensor
    directions: Tensor
    mean: Tensor


def _opened(stream: memoryview) -> _Opened | None:
    """None where the lengths do not fit."""
    if len(stream) < HEADER_BYTES:
        return None
    words, escapes = np.frombuffer(stream, "<u4", 2, 4 * LANES).tolist()
    if HEADER_BYTES + 2 * (words + escapes) != len(stream):
        return None
    return _Opened(np.frombuffer(stream, "<i4", LANES), escapes)


@functools.lru_cache(maxsize=16)
def _on_device(transform: Transform, device: torch.device) -> _Tables:
    first = np.concatenate([[0], np.cumsum(transform.counts.sum(1))])
    return _Tables(
        torch.from_numpy(first).to(device),
        torch.from_numpy(transform.counts).to(device),
        torch.from_numpy(transform.distribution).to(device),
        torch.from_numpy(transform.distributions.slots.view(np.int32)).to(device),
        transform.directions.to(device),
        transform.mean.to(device),
    )


def _angles(
    rotations: Sequence[Rotation | None], start: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each different rotation, float32 `[rotations, 2, length, half]`, and which one a layer has
    (int32, -1 for none).

    """
    different = list({id(rotation): rotation for rotation in rotations if rotation is not None}.values())
    rows = slice(start, start + length)
    turns = [torch.stack([rotation.cos[rows], rotation.sin[rows]]).to(device) for rotation in different]
    index = {id(rotation): number for number, rotation in enumerate(different)}
    which = torch.tensor([index.get(id(rotation), -1) for rotation in rotations], dtype=torch.int32, device=device)
    return (torch.stack(turns) if turns else torch.zeros(1, 2, 1, 1, device=device)), which


@triton.jit
def _decode(
    words, places, states, first, distribution, slots, symbols, fits, tokens, layers, largest,
    LANES: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    lane = tl.arange(0, LANES)
    word = tl.load(places + layer)
    escape = tl.load(places + layers + layer)
    words_end = escape
    escapes_end = tl.load(places + 2 * layers + layer)
    state = tl.load(states + layer * LANES + lane).to(tl.uint32, bitcast=True)
    from_column = tl.load(first + layer)
    to_column = tl.load(first + layer + 1)
    for group in range(0, tokens, LANES):
        active = group + lane < tokens
        for column in range(from_column, to_column):
            slot = tl.load(distribution + column).to(tl.int32) * 4096 + (state & 4095).to(tl.int32)
            entry = tl.load(slots + slot).to(tl.uint32, bitcast=True)
            symbol = (entry >> 24).to(tl.int32)
            state = tl.where(active, ((entry >> 12) & 4095) * (state >> 12) + (entry & 4095), state)
            hungry = (active & (state < LOWEST)).to(tl.int32)
            at = word + tl.cumsum(hungry, 0) - 1
            taken = tl.load(words + at, mask=(hungry > 0) & (at < words_end), other=0)
            state = tl.where(hungry > 0, (state << 16) | (taken.to(tl.uint32) & 65535), state)
            word += tl.sum(hungry, 0)
            escaped = (active & (symbol == 2 * largest + 1)).to(tl.int32)
            at = escape + tl.cumsum(escaped, 0) - 1
            raw = tl.load(words + at, mask=(escaped > 0) & (at < escapes_end), other=0)
            escape += tl.sum(escaped, 0)
            found = tl.where(escaped > 0, raw.to(tl.int32), symbol - largest)
            tl.store(symbols + column * tokens + group + lane, found.to(tl.int16), mask=active)
    final = tl.sum((state != LOWEST).to(tl.int32), 0) == 0
    tl.store(fits + layer, (final & (word == words_end) & (escape == escapes_end)).to(tl.int32))


@triton.jit
def _place(
    symbols, first, counts, directions, mean, turns, which, key, value,
    tokens, offset, length, heads, size, half, key_layer, key_token, value_layer, value_token,
    INTERLEAVED: tl.constexpr, SIZE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COORDINATES: tl.constexpr,
):  # fmt: skip
    layer = (tl.program_id(0) // 2).to(tl.int64)  # times a stride, it may take more than 32 bits
    part = tl.program_id(0) % 2
    head = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    here = token < length
    k_count = tl.load(counts + 2 * layer)
    count = tl.load(counts + 2 * layer + part)
    base = tl.load(first + layer) + part * k_count
    dim = tl.arange(0, SIZE)
    inside = dim < size
    turn = tl.load(which + layer)
    rotated = dim < tl.where((part == 0) & (turn >= 0), 2 * half, 0)
    # A dimension's partner, with which it is turned: its own value minus, or plus, the partner's times the sine.
    if INTERLEAVED:
        partner = dim ^ 1
        angle = dim // 2
        is_first = (dim & 1) == 0
    else:
        partner = tl.where(dim < half, dim + half, dim - half)
        angle = tl.where(dim < half, dim, dim - half)
        is_first = dim < half
    partner = tl.where(rotated, partner, dim)
    channels = heads * size
    own = tl.zeros((BLOCK_TOKENS, SIZE), dtype=tl.float32)
    other = tl.zeros((BLOCK_TOKENS, SIZE), dtype=tl.float32)
    for at in range(0, count, BLOCK_COORDINATES):
        coordinate = at + tl.arange(0, BLOCK_COORDINATES)
        known = coordinate < count
        step = tl.load(
            symbols + (base + coordinate)[None, :] * tokens + (offset + token)[:, None],
            mask=known[None, :] & here[:, None],
            other=0,
        ).to(tl.float32)
        rows = directions + (base + coordinate)[:, None] * channels + head * size
        mask = known[:, None] & inside[None, :]
        own += tl.dot(step, tl.load(rows + dim[None, :], mask=mask, other=0.0), input_precision="ieee")
        other += tl.dot(step, tl.load(rows + partner[None, :], mask=mask, other=0.0), input_precision="ieee")
    centre = mean + (2 * layer + part) * channels + head * size
    own += tl.load(centre + dim, mask=inside, other=0.0)[None, :]
    other += tl.load(centre + partner, mask=inside, other=0.0)[None, :]
    table = turns + turn * 2 * length * half + token[:, None] * half + angle[None, :]
    mask = rotated[None, :] & here[:, None]
    cosine = tl.load(table, mask=mask, other=1.0)
    sine = tl.load(table + length * half, mask=mask, other=0.0)
    found = own * cosine + tl.where(is_first[None, :], -other, other) * sine
    place = token[:, None] * tl.where(part == 0, key_token, value_token) + (head * size + dim)[None, :]
    of_key = here[:, None] & (dim < tl.where(part == 0, size, 0))[None, :]
    of_value = here[:, None] & (dim < tl.where(part == 1, size, 0))[None, :]
    tl.store(key + layer * key_layer + place, found.to(key.dtype.element_ty), mask=of_key)
    tl.store(value + layer * value_layer + place, found.to(value.dtype.element_ty), mask=of_value)
