"""Restoring as a readable PyTorch reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmcache_rag_kernels import rans
from lmcache_rag_kernels.rope import rotate

if TYPE_CHECKING:
    from lmcache_rag_kernels.restore import Transform
    from lmcache_rag_kernels.restore.coded import CodedGroups
    from lmcache_rag_kernels.rows import Rows


def restore(coded: CodedGroups, transform: Transform, offset: int, rows: Rows) -> int | None:
    """See `lmcache_rag_kernels.restore.restore`."""
    key, value, length = rows.key, rows.value, rows.length
    positions = torch.arange(rows.start, rows.start + length, device=key.device)
    groups = coded.holding(offset, length)
    for layer in range(coded.layers):
        own = transform.layer(layer)
        for group in groups:
            begin, end = coded.span(group)
            stream = coded.stream(group, layer)
            coordinates = rans.decode(stream, own.distribution, own.distributions, end - begin)
            if coordinates is None:
                return layer
            first, last = max(begin, offset), min(end, offset + length)
            wanted = coordinates[:, first - begin : last - begin].to(key.device).mT * own.step
            here = slice(first - offset, last - offset)
            k, v = _inverse(wanted, own)
            k, v = (part.view(-1, *key.shape[2:]) for part in (k, v))
            rotation = rows.rotations[layer]
            key[layer, here] = k if rotation is None else rotate(k, rotation, positions[here])
            value[layer, here] = v
    return None


def _inverse(coordinates: Tensor, own: Transform) -> list[Tensor]:
    """One layer's K and V, float32 `[tokens, channels]`, from its coordinates `[tokens, coordinates]`."""
    head_groups = own.directions.shape[2]
    means = own.mean.view(2 * head_groups, -1).to(coordinates.device)
    directions = own.directions[0].flatten(0, 1).to(coordinates.device)
    parts = coordinates.split(own.counts.flatten().tolist(), dim=1)
    rows = [
        torch.addmm(mean, part, matrix[: part.shape[1]])
        for part, mean, matrix in zip(parts, means, directions, strict=True)
    ]
    return [torch.cat(rows[:head_groups], dim=1), torch.cat(rows[head_groups:], dim=1)]
