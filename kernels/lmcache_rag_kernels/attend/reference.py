"""Dense attention of scattered queries in PyTorch: each query sees exactly the positions that its mask allows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_QUERY_BLOCK = 64


def attend(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float, window: int | None, out: Tensor
) -> None:
    """Causal attention of queries at `positions` over keys at positions 0, 1, ...

    Queries are taken in blocks, and keys are cut to those that a block can see, so that the cost is close to that of
    the pairs that the mask allows.

    Args:
        query: `[queries, heads, head_size]`, RoPE applied.
        key, value: `[tokens, kv_heads, head_size]`; row i is position i.
        positions: int64 `[queries]`, ascending, each below `tokens`.
        window: a query sees its own position and the `window - 1` before it; None for all.
        out: `[queries, heads, head_size]`, written.
    """
    for start in range(0, len(positions), _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        at = positions[block]
        low, high = visible_range(at, window)
        mask = visible(at, low, high, window)
        result = scaled_dot_product_attention(
            query[block].transpose(0, 1)[None],
            key[low:high].transpose(0, 1)[None],
            value[low:high].transpose(0, 1)[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        out[block].copy_(result[0].transpose(0, 1))


def attend_weighing(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float, window: int | None, out: Tensor
) -> Tensor:
    """`attend`, which also returns how much attention each key gets, summed over queries and heads.

    For a few queries, such as a question's: the weights of a block of queries are kept whole.

    Returns:
        float32 `[tokens]`.
    """
    kv_heads = key.shape[1]
    group = query.shape[1] // kv_heads
    mass = torch.zeros(key.shape[0], dtype=torch.float32, device=key.device)
    for start in range(0, len(positions), _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        at = positions[block]
        low, high = visible_range(at, window)
        # A kv head's group is folded into its queries: [kv_heads, group * queries, head_size] times the head's keys.
        # They are scaled first, so that half precision does not overflow.
        folded = (query[block] * scale).unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
        logits = (folded @ key[low:high].permute(1, 2, 0)).float()
        # All queries see the keys between these two, which is nearly all there are.
        seen_low = low if window is None else max(low, int(at[-1]) - window + 1)
        seen_high = int(at[0]) + 1
        by_query = logits.unflatten(1, (group, len(at)))
        for first, last in ((low, seen_low), (max(low, seen_high), high)):
            hidden = ~visible(at, first, last, window)
            by_query[..., first - low : last - low].masked_fill_(hidden, -torch.inf)
        weights = logits.softmax(-1)
        mass[low:high] += weights.sum((0, 1))
        result = weights.to(value.dtype) @ value[low:high].transpose(0, 1)
        out[block].unflatten(1, (kv_heads, group)).copy_(result.unflatten(1, (group, len(at))).permute(2, 0, 1, 3))
    return mass


def visible_range(positions: Tensor, window: int | None) -> tuple[int, int]:
    """The first and one past the last key that any of the ascending `positions` sees."""
    low = 0 if window is None else max(0, int(positions[0]) - window + 1)
    return low, int(positions[-1]) + 1


def visible(positions: Tensor, low: int, high: int, window: int | None) -> Tensor:
    """Which of the keys `low` to `high` each query sees: bool `[queries, high - low]`."""
    keys = torch.arange(low, high, device=positions.device)[None]
    mask = keys <= positions[:, None]
    if window is not None:
        mask &= keys > positions[:, None] - window
    return mask
