"""The Triton version, for CUDA: flash attention in which the host reads nothing back from the device.

A program takes a few queries of one kv head, with all of the heads that share it, and goes over the keys from the
first to the last that any of its queries sees. To weigh keys, a second kernel computes the logits anew, a block of keys
a program.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HEAD_SIZE = 256
MAX_GROUP = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MAX_ROWS = 128
_MAX_ROWS_LARGE = 64  # of large heads
_MAX_ROWS_FLOAT32 = 16  # more do not fit into registers
_ENOUGH_PROGRAMS = 128  # to keep a GPU busy
_BLOCK_K = 64
_BLOCK_K_LARGE = 32
_WEIGH_ROWS = 32


def fits(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, out: Tensor) -> bool:
    """Whether it is for tensors like these."""
    tensors = (query, key, value, out)
    return (
        all(t.is_cuda and t.dtype == query.dtype and t.stride(-1) == 1 for t in tensors)
        and positions.is_cuda
        and query.dtype in DTYPES
        and query.shape[-1] <= MAX_HEAD_SIZE
        and query.shape[1] <= key.shape[1] * MAX_GROUP
        and _is_recent(query.device)
    )


@functools.cache
def _is_recent(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU of 2020 (Ampere) or later: older ones have too little shared memory."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float, window: int | None, out: Tensor
) -> None:
    """Arguments as `reference.attend`."""
    _attend_blocks(query, key, value, positions, scale, window, out, None)


def attend_weighing(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float, window: int | None, out: Tensor
) -> Tensor:
    """As `reference.attend_weighing`. The sum is taken in the same order every time."""
    queries, heads, size = query.shape
    tokens, kv_heads = key.shape[:2]
    if not queries or not tokens:
        return torch.zeros(tokens, dtype=torch.float32, device=key.device)
    sums = torch.empty(kv_heads, queries, heads // kv_heads, dtype=torch.float32, device=query.device)
    _attend_blocks(query, key, value, positions, scale, window, out, sums)
    mass = torch.empty(kv_heads, tokens, dtype=torch.float32, device=key.device)
    block = _block_of_keys(query)
    _weigh[(triton.cdiv(tokens, block), kv_heads)](
        query, key, positions.contiguous(), sums, mass,
        queries, tokens, size, tokens if window is None else window, scale * math.log2(math.e),
        query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        GROUP=heads // kv_heads, ROWS=_WEIGH_ROWS, BLOCK_K=block, SIZE=_padded(size), num_stages=_stages(query),
    )  # fmt: skip
    return mass.sum(0)


def _attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
    sums: Tensor | None,
) -> None:
    """`attend`, which also writes the logarithm of each query's sum of weights, to `[kv_heads, queries, group]`."""
    queries, heads, size = query.shape
    tokens, kv_heads = key.shape[:2]
    if not queries:
        return
    group = heads // kv_heads
    rows = _rows(queries, kv_heads, group, _most_rows(query))
    _attend[(triton.cdiv(queries, rows // group), kv_heads)](
        query, key, value, positions.contiguous(), out, sums,
        queries, tokens, size, tokens if window is None else window, scale * math.log2(math.e),
        query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), out.stride(0), out.stride(1),
        GROUP=group, ROWS=rows, BLOCK_K=_block_of_keys(query), SIZE=_padded(size),
        num_warps=_warps(query, rows), num_stages=_stages(query),
    )  # fmt: skip


def _rows(queries: int, kv_heads: int, group: int, most: int) -> int:
    """Rows, a query's head each, that a program takes: as many as leave enough programs, up to `most`."""
    least = max(16, triton.next_power_of_2(group))
    rows = max(least, most)
    while rows > least and triton.cdiv(queries, rows // group) * kv_heads < _ENOUGH_PROGRAMS:
        rows //= 2
    return rows


def _most_rows(query: Tensor) -> int:
    if query.dtype == torch.float32:
        return _MAX_ROWS_FLOAT32
    return _MAX_ROWS_LARGE if query.shape[-1] > 128 else _MAX_ROWS


def _block_of_keys(query: Tensor) -> int:
    return _BLOCK_K_LARGE if query.shape[-1] > 128 or query.dtype == torch.float32 else _BLOCK_K


def _warps(query: Tensor, rows: int) -> int:
    return 8 if rows == _MAX_ROWS or query.dtype == torch.float32 else 4


def _stages(query: Tensor) -> int:
    """How many blocks of keys are in shared memory at a time; float32 has no tensor cores that wait for them."""
    if query.dtype == torch.float32:
        return 1
    return 2 if query.shape[-1] > 128 else 3


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


# What differs between requests does not make Triton compile again.
@triton.jit(do_not_specialize=["queries", "tokens", "window"], do_not_specialize_on_alignment=["positions"])
def _attend(
    query, key, value, positions, out, sums,
    queries, tokens, size, window, scale,
    query_token, query_head, key_token, key_head, value_token, value_head, out_token, out_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    queries_each: tl.constexpr = ROWS // GROUP
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * queries_each  # the last queries see most, so they go first
    kv_head = tl.program_id(1).to(tl.int64)  # times a stride, it may take more than 32 bits
    row = tl.arange(0, ROWS)
    at = start + row // GROUP
    head = kv_head * GROUP + row % GROUP
    held = (row < queries_each * GROUP) & (at < queries)
    position = tl.load(positions + at, mask=held, other=-1).to(tl.int32)
    first = tl.load(positions + start).to(tl.int32)
    last = tl.load(positions + tl.minimum(start + queries_each, queries) - 1).to(tl.int32)
    low = tl.maximum(first - window + 1, 0)
    high = tl.minimum(last + 1, tokens)
    dim = tl.arange(0, SIZE)
    inside = dim < size
    own = held[:, None] & inside[None, :]
    place = at.to(tl.int64)[:, None] * query_token + head[:, None] * query_head + dim[None, :]
    asked = tl.load(query + place, mask=own, other=0.0)
    keys = key + kv_head * key_head + dim[None, :]
    values = value + kv_head * value_head + dim[None, :]
    # Finite, so that a row of which no key is seen yet has no infinity to take from another.
    highest = tl.full((ROWS,), -1e38, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    result = tl.zeros((ROWS, SIZE), dtype=tl.float32)
    for block in range(low // BLOCK_K * BLOCK_K, high, BLOCK_K):
        token = block + tl.arange(0, BLOCK_K)
        read = ((token >= low) & (token < high))[:, None] & inside[None, :]
        far = token.to(tl.int64)[:, None]
        known = tl.load(keys + far * key_token, mask=read, other=0.0)
        logits = tl.dot(asked, tl.trans(known), input_precision="ieee") * scale
        seen = (token[None, :] <= position[:, None]) & (token[None, :] > position[:, None] - window)
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        fade = tl.exp2(highest - higher)
        weights = tl.exp2(logits - higher[:, None])
        total = total * fade + tl.sum(weights, 1)
        wanted = tl.load(values + far * value_token, mask=read, other=0.0)
        result = tl.dot(weights.to(wanted.dtype), wanted, result * fade[:, None], input_precision="ieee")
        highest = higher
    total = tl.where(held, total, 1.0)
    place = at.to(tl.int64)[:, None] * out_token + head[:, None] * out_head + dim[None, :]
    tl.store(out + place, (result / total[:, None]).to(out.dtype.element_ty), mask=own)
    if sums is not None:
        place = kv_head * queries * GROUP + at * GROUP + row % GROUP
        tl.store(sums + place, highest + tl.log2(total), mask=held)


@triton.jit(do_not_specialize=["queries", "tokens", "window"], do_not_specialize_on_alignment=["positions"])
def _weigh(
    query, key, positions, sums, mass,
    queries, tokens, size, window, scale, query_token, query_head, key_token, key_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCK_K
    token = block + tl.arange(0, BLOCK_K)
    dim = tl.arange(0, SIZE)
    inside = dim < size
    keys = key + token.to(tl.int64)[:, None] * key_token + kv_head * key_head + dim[None, :]
    known = tl.trans(tl.load(keys, mask=(token < tokens)[:, None] & inside[None, :], other=0.0))
    rows = queries * GROUP
    given = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        first = tl.load(positions + start // GROUP).to(tl.int32)
        last = tl.load(positions + (tl.minimum(start + ROWS, rows) - 1) // GROUP).to(tl.int32)
        if (block <= last) & (block + BLOCK_K > first - window + 1):
            row = start + tl.arange(0, ROWS)
            held = row < rows
            position = tl.load(positions + row // GROUP, mask=held, other=-1).to(tl.int32)
            head = kv_head * GROUP + row % GROUP
            place = (row // GROUP).to(tl.int64)[:, None] * query_token + head[:, None] * query_head + dim[None, :]
            asked = tl.load(query + place, mask=held[:, None] & inside[None, :], other=0.0)
            total = tl.load(sums + kv_head * rows + row, mask=held, other=0.0)
            logits = tl.dot(asked, known, input_precision="ieee") * scale
            seen = (token[None, :] <= position[:, None]) & (token[None, :] > position[:, None] - window)
            given += tl.sum(tl.exp2(tl.where(seen, logits - total[:, None], float("-inf"))), 0)
    tl.store(mass + kv_head * tokens + token, given, mask=token < tokens)
