"""The Triton version, for CUDA. Coded bytes go to the device, an eighth of what they become there.

Two kernels: entropy decoding, a layer of one group of tokens a program, since its stream is one chain of sixteen
states; then, a head of a few tokens a program, the inverse transform and the rotation, straight to where K and V
belong. Decoding waits for memory at each step of its chain, so that chunks are decoded beside each other, each in a
stream of the device's own.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lmcache_rag_kernels.rans.reference import LANES, LOWEST

if TYPE_CHECKING:
    from lmcache_rag_kernels.restore import Transform
    from lmcache_rag_kernels.restore.coded import CodedGroups
    from lmcache_rag_kernels.rows import Rows

_BLOCK_TOKENS = 32
_BLOCK_COORDINATES = 32

_STREAMS = 8
"""Chunks that are decoded at a time."""


def fits(rows: Rows) -> bool:
    """Whether it is for tensors like these."""
    kinds = {(rotation.rotary_dim, rotation.interleaved) for rotation in rows.rotations if rotation is not None}
    return rows.key.is_cuda and len(kinds) <= 1


def restore(coded: CodedGroups, transform: Transform, offset: int, rows: Rows) -> int | None:
    """See `lmcache_rag_kernels.restore.restore`. Streams begin at even places in `coded.data`."""
    key, value = rows.key, rows.value
    groups = coded.holding(offset, key.shape[1])
    if not groups:
        return None
    layers, length, heads, size = key.shape
    places = coded.places[groups.start : groups.stop].transpose(1, 0, 2)
    odd = np.flatnonzero((places % 2).any((1, 2)))
    if len(odd):
        return int(odd[0])
    tables = _on_device(transform, key.device)
    begin, end = coded.span(groups[0])[0], coded.span(groups[-1])[1]
    largest = (transform.distributions.frequencies.shape[1] - 2) // 2
    aside = _Aside(key.device)
    with aside:
        symbols = torch.empty(len(transform.distribution), end - begin, dtype=torch.int16, device=key.device)
        fits = torch.empty(layers, len(groups), dtype=torch.int32, device=key.device)
        words, spans = _words(coded.data, places, key.device)
        _decode[(layers * len(groups),)](
            words, spans, tables.first, tables.distribution, tables.slots, symbols, fits,
            2 * transform.counts.shape[2], len(groups), coded.group, end - begin, largest, LANES=LANES, LOWEST=LOWEST,
            num_warps=1,
        )  # fmt: skip
    aside.join(symbols, fits)

    def failed() -> int | None:
        found = (fits.cpu() == 0).any(1).nonzero().flatten()
        return int(found[0]) if len(found) else None

    if rows.verdicts is None:
        wrong = failed()
        if wrong is not None:
            return wrong
    else:
        rows.verdicts.append(failed)
    turns, which = _angles(rows)
    grid = (layers * 2, heads, triton.cdiv(length, _BLOCK_TOKENS))
    interleaved = any(rotation is not None and rotation.interleaved for rotation in rows.rotations)
    _place[grid](
        symbols, tables.first, tables.counts, tables.directions, tables.mean, turns, which, key, value,
        end - begin, offset - begin, length, heads, size, heads // transform.counts.shape[2], turns.shape[3],
        transform.step, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        INTERLEAVED=interleaved, PAIRS=max(16, triton.next_power_of_2(triton.cdiv(size, 2))),
        BLOCK_TOKENS=_BLOCK_TOKENS, BLOCK_COORDINATES=_BLOCK_COORDINATES,
    )  # fmt: skip
    return None


class _Aside:
    """What is launched within goes on beside what the current stream does, which waits for it where it is joined."""

    _next = itertools.count()

    def __init__(self, device: torch.device) -> None:
        self._stream = _streams(device)[next(self._next) % _STREAMS] if torch.cuda.is_available() else None
        self._entered = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        self._entered.__enter__()

    def __exit__(self, *error: object) -> None:
        self._entered.__exit__(*error)  # type: ignore[arg-type]

    def join(self, *made: Tensor) -> None:
        """Have the current stream wait, and go on with what was `made`."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for tensor in made:
                tensor.record_stream(current)


@functools.cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(_STREAMS)]


def _words(data: memoryview, places: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """The bytes of streams at `places` `[layers, groups, 2]`, on a device as int16, and where each stream begins and
    ends there, int64 `[layers, groups, 2]`."""
    spans = np.stack([places[..., 0], places.sum(-1)], axis=-1) // 2
    first, last = int(spans.min()), int(spans.max())
    words = _to_be_copied(last - first + 1, torch.int16)
    words[:-1].numpy()[:] = np.frombuffer(data, "<i2", last - first, 2 * first)
    words[-1] = 0
    places_there = _to_be_copied(spans.size, torch.int64).view(spans.shape)
    places_there.numpy()[:] = spans - first
    return words.to(device, non_blocking=True), places_there.to(device, non_blocking=True)


def _to_be_copied(length: int, dtype: torch.dtype) -> Tensor:
    """Memory that a device copies from without holding up the host."""
    return torch.empty(length, dtype=dtype, pin_memory=torch.cuda.is_available())


class _Tables(NamedTuple):
    """A transform on a device; `first` is each head group's first coordinate, int64 `[layers, 2, head groups]`, and
    behind the last the end. Directions are float16, which tables are stored in, for tensor cores."""

    first: Tensor
    counts: Tensor
    distribution: Tensor
    slots: Tensor
    directions: Tensor
    mean: Tensor


@functools.lru_cache(maxsize=16)
def _on_device(transform: Transform, device: torch.device) -> _Tables:
    first = np.concatenate([[0], np.cumsum(transform.counts)])
    tables = _Tables(
        torch.from_numpy(first).to(device),
        torch.from_numpy(transform.counts).to(device),
        torch.from_numpy(transform.distribution).to(device),
        torch.from_numpy(transform.distributions.slots.view(np.int32)).to(device),
        _moved(transform.directions, device),
        transform.mean.to(device),
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)  # other streams read them too
    return tables


@functools.lru_cache(maxsize=8)
def _moved(directions: Tensor, device: torch.device) -> Tensor:
    """On a device, once for all steps of a model."""
    return directions.to(device, torch.float16)


def _angles(rows: Rows) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each different rotation, float32 `[rotations, 2, length, half]`, and which one a layer has
    (int32, -1 for none).
    """
    device = rows.key.device
    different = list({id(rotation): rotation for rotation in rows.rotations if rotation is not None}.values())
    positions = slice(rows.start, rows.start + rows.length)
    turns = [torch.stack([rotation.cos[positions], rotation.sin[positions]]).to(device) for rotation in different]
    index = {id(rotation): number for number, rotation in enumerate(different)}
    which = _to_be_copied(len(rows.rotations), torch.int32)
    which.numpy()[:] = [index.get(id(rotation), -1) for rotation in rows.rotations]
    table = torch.stack(turns) if turns else torch.zeros(1, 2, 1, 1, device=device)
    return table, which.to(device, non_blocking=True)


@triton.jit
def _decode(
    words, spans, first, distribution, slots, symbols, fits, matrices, groups, group, tokens, largest,
    LANES: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0) // groups
    base = tl.program_id(0) % groups * group
    rows = tl.minimum(group, tokens - base)
    lane = tl.arange(0, LANES)
    begin = tl.load(spans + 2 * tl.program_id(0))
    end = tl.load(spans + 2 * tl.program_id(0) + 1)
    word = begin + 2 * tl.minimum(rows, LANES)
    whole = word <= end
    held = lane < tl.where(whole, rows, 0)
    low = tl.load(words + begin + 2 * lane, mask=held, other=0).to(tl.uint32) & 65535
    high = tl.load(words + begin + 2 * lane + 1, mask=held, other=0).to(tl.uint32) & 65535
    state = tl.where(held, high << 16 | low, LOWEST)
    from_column = tl.load(first + layer * matrices)
    to_column = tl.load(first + (layer + 1) * matrices)
    for block in range(0, rows, LANES):
        active = block + lane < rows
        for column in range(from_column, to_column):
            slot = tl.load(distribution + column).to(tl.int32) * 4096 + (state & 4095).to(tl.int32)
            entry = tl.load(slots + slot).to(tl.uint32, bitcast=True)
            symbol = (entry >> 24).to(tl.int32)
            state = tl.where(active, ((entry >> 12) & 4095) * (state >> 12) + (entry & 4095), state)
            hungry = (active & (state < LOWEST)).to(tl.int32)
            at = word + tl.cumsum(hungry, 0) - 1
            taken = tl.load(words + at, mask=(hungry > 0) & (at < end), other=0)
            state = tl.where(hungry > 0, (state << 16) | (taken.to(tl.uint32) & 65535), state)
            word += tl.sum(hungry, 0)
            escaped = (active & (symbol == 2 * largest + 1)).to(tl.int32)
            at = word + tl.cumsum(escaped, 0) - 1
            raw = tl.load(words + at, mask=(escaped > 0) & (at < end), other=0)
            word += tl.sum(escaped, 0)
            found = tl.where(escaped > 0, raw.to(tl.int32), symbol - largest)
            tl.store(symbols + column * tokens + base + block + lane, found.to(tl.int16), mask=active)
    final = tl.sum((state != LOWEST).to(tl.int32), 0) == 0
    tl.store(fits + tl.program_id(0), (whole & final & (word == end)).to(tl.int32))


@triton.jit
def _place(
    symbols, first, counts, directions, mean, turns, which, key, value,
    tokens, offset, length, heads, size, together, half, step, key_layer, key_token, value_layer, value_token,
    INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COORDINATES: tl.constexpr,
):  # fmt: skip
    layer = (tl.program_id(0) // 2).to(tl.int64)  # times a stride, it may take more than 32 bits
    part = tl.program_id(0) % 2
    head = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    here = token < length
    matrix = (2 * layer + part) * (heads // together) + head // together  # of the head's group
    count = tl.load(counts + matrix)
    base = tl.load(first + matrix)
    width = together * size
    # Dimensions in pairs: those that are rotated with each other, and behind them the others.
    pair = tl.arange(0, PAIRS)
    if INTERLEAVED:
        low = 2 * pair
        high = low + 1
    else:
        low = tl.where(pair < half, pair, 2 * pair)
        high = tl.where(pair < half, pair + half, 2 * pair + 1)
    is_low = low < size
    is_high = high < size
    lows = tl.zeros((BLOCK_TOKENS, PAIRS), dtype=tl.float32)
    highs = tl.zeros((BLOCK_TOKENS, PAIRS), dtype=tl.float32)
    for at in range(0, count, BLOCK_COORDINATES):
        coordinate = at + tl.arange(0, BLOCK_COORDINATES)
        known = coordinate < count
        steps = tl.load(
            symbols + (base + coordinate)[None, :] * tokens + (offset + token)[:, None],
            mask=known[None, :] & here[:, None],
            other=0,
        ).to(tl.float16)  # exact to 2048, of which there are none but escapes
        rows = directions + matrix * width * width + coordinate[:, None] * width + head % together * size
        lows += tl.dot(steps, tl.load(rows + low[None, :], mask=known[:, None] & is_low[None, :], other=0.0))
        highs += tl.dot(steps, tl.load(rows + high[None, :], mask=known[:, None] & is_high[None, :], other=0.0))
    centre = mean + (2 * layer + part) * heads * size + head * size
    lows = lows * step + tl.load(centre + low, mask=is_low, other=0.0)[None, :]
    highs = highs * step + tl.load(centre + high, mask=is_high, other=0.0)[None, :]
    turn = tl.load(which + layer)
    table = turns + turn * 2 * length * half + token[:, None] * half + pair[None, :]
    rotated = (pair < tl.where((part == 0) & (turn >= 0), half, 0))[None, :] & here[:, None]
    cosine = tl.load(table, mask=rotated, other=1.0)
    sine = tl.load(table + length * half, mask=rotated, other=0.0)
    turned = lows * cosine - highs * sine
    highs = highs * cosine + lows * sine
    place = token[:, None] * tl.where(part == 0, key_token, value_token) + head * size
    for_key = (token < tl.where(part == 0, length, 0))[:, None]
    for_value = (token < tl.where(part == 1, length, 0))[:, None]
    key_at = key + layer * key_layer + place
    value_at = value + layer * value_layer + place
    kind = key.dtype.element_ty
    tl.store(key_at + low[None, :], turned.to(kind), mask=for_key & is_low[None, :])
    tl.store(key_at + high[None, :], highs.to(kind), mask=for_key & is_high[None, :])
    tl.store(value_at + low[None, :], turned.to(kind), mask=for_value & is_low[None, :])
    tl.store(value_at + high[None, :], highs.to(kind), mask=for_value & is_high[None, :])
