"""The Triton version, for CUDA: a program for a head of some rows of a chunk, all chunks in one launch for K and one
for V. The change is rotated back as it is loaded, and what is carried over rotated to its place before it is added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmcache_rag_kernels.carry.lesson import Lesson
from lmcache_rag_kernels.rope import Rotation

_ROWS = 64
_TAUGHT = 32
_FIELDS = 6


class Carrier:
    """See `lmcache_rag_kernels.carry.Carrier`."""

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        device = lessons[0].weights.device
        blocks, taught_at, weights_at = [], 0, 0
        for lesson in lessons:
            start, rows, taught = lesson.rows.start, lesson.rows.stop - lesson.rows.start, len(lesson.taught)
            blocks += [[start, first, rows, taught_at, taught, weights_at] for first in range(0, rows, _ROWS)]
            taught_at, weights_at = taught_at + taught, weights_at + rows * taught
        pinned = device.type == "cuda"
        self._blocks = torch.tensor(blocks, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=True)
        self._taught = torch.cat([lesson.taught for lesson in lessons])
        self._weights = torch.cat([lesson.weights.flatten() for lesson in lessons])

    def __call__(
        self, key: Tensor, value: Tensor, key_before: Tensor, value_before: Tensor, rotation: Rotation | None
    ) -> None:
        self._carry_over(key, key_before, rotation)
        self._carry_over(value, value_before, None)

    def _carry_over(self, into: Tensor, before: Tensor, rotation: Rotation | None) -> None:
        _, heads, size = into.shape
        cos, sin = (self._weights, self._weights) if rotation is None else (rotation.cos, rotation.sin)
        _carry[(len(self._blocks), heads)](
            into, before, self._blocks, self._taught, self._weights, cos, sin,
            size, 0 if rotation is None else cos.shape[1],
            into.stride(0), into.stride(1), before.stride(0), before.stride(1),
            INTERLEAVED=rotation is not None and rotation.interleaved,
            PAIRS=max(16, triton.next_power_of_2(triton.cdiv(size, 2))),
            PRECISION="ieee" if into.dtype == torch.float32 else "tf32",
            ROWS=_ROWS, TAUGHT=_TAUGHT, FIELDS=_FIELDS,
        )  # fmt: skip


@triton.jit
def _carry(
    into, before, blocks, taught, weights, cos, sin, size, half, into_token, into_head, before_token, before_head,
    INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, TAUGHT: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    block = blocks + tl.program_id(0) * FIELDS
    head = tl.program_id(1)
    start = tl.load(block)
    row = tl.load(block + 1) + tl.arange(0, ROWS)
    rows = tl.load(block + 2)
    taught_at = tl.load(block + 3)
    count = tl.load(block + 4)
    weights_at = tl.load(block + 5)
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
    lows = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    highs = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    for at in range(0, count, TAUGHT):
        index = at + tl.arange(0, TAUGHT)
        known = index < count
        weight = tl.load(
            weights + weights_at + row[:, None] * count + index[None, :],
            mask=(row < rows)[:, None] & known[None, :],
            other=0.0,
        )
        position = tl.load(taught + taught_at + index, mask=known, other=0)
        now = into + position[:, None] * into_token + head * into_head
        then = before + (taught_at + index)[:, None] * before_token + head * before_head
        mask = known[:, None] & is_low[None, :]
        low_change = tl.load(now + low[None, :], mask=mask, other=0.0).to(tl.float32)
        low_change -= tl.load(then + low[None, :], mask=mask, other=0.0).to(tl.float32)
        mask = known[:, None] & is_high[None, :]
        high_change = tl.load(now + high[None, :], mask=mask, other=0.0).to(tl.float32)
        high_change -= tl.load(then + high[None, :], mask=mask, other=0.0).to(tl.float32)
        mask = known[:, None] & (pair < half)[None, :]
        cosine = tl.load(cos + position[:, None] * half + pair[None, :], mask=mask, other=1.0)
        sine = tl.load(sin + position[:, None] * half + pair[None, :], mask=mask, other=0.0)
        back = low_change * cosine + high_change * sine
        high_change = high_change * cosine - low_change * sine
        lows += tl.dot(weight, back, input_precision=PRECISION)
        highs += tl.dot(weight, high_change, input_precision=PRECISION)
    here = (row < rows)[:, None]
    place = start + row
    mask = here & (pair < half)[None, :]
    cosine = tl.load(cos + place[:, None] * half + pair[None, :], mask=mask, other=1.0)
    sine = tl.load(sin + place[:, None] * half + pair[None, :], mask=mask, other=0.0)
    turned = lows * cosine - highs * sine
    highs = highs * cosine + lows * sine
    # Rows that are taught get nothing, so that it does not matter who reads them while they are written.
    place = into + place[:, None] * into_token + head * into_head
    kind = into.dtype.element_ty
    mask = here & is_low[None, :]
    turned += tl.load(place + low[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(place + low[None, :], turned.to(kind), mask=mask)
    mask = here & is_high[None, :]
    highs += tl.load(place + high[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(place + high[None, :], highs.to(kind), mask=mask)
