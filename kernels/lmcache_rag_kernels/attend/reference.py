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


def attention_mass(query: Tensor, key: Tensor, positions: Tensor, *, scale: float, window: int | None) -> Tensor:
    """How much attention each key gets, summed over queries and heads: float32 `[tokens]`. Arguments as `attend`."""
    group = query.shape[1] // key.shape[1]
    mass = torch.zeros(key.shape[0], dtype=torch.float32, device=key.device)
    for start in range(0, len(positions), _QUERY_BLOCK):
        at = positions[start : start + _QUERY_BLOCK]
        low, high = visible_range(at, window)
        # A kv head's group is folded into its queries: [kv_heads, group * queries, head_size] times the head's keys.
        by_head = query[start : start + _QUERY_BLOCK].unflatten(1, (key.shape[1], group))
        folded = by_head.permute(1, 2, 0, 3).flatten(1, 2)
        logits = (folded @ key[low:high].permute(1, 2, 0)).float() * scale
        hidden = ~visible(at, low, high, window)
        logits.unflatten(1, (group, len(at))).masked_fill_(hidden, -torch.inf)
        mass[low:high] += logits.softmax(-1).sum((0, 1))
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
