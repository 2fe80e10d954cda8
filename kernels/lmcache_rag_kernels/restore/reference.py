"""Restoring as a readable PyTorch reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmcache_rag_kernels import rans
from lmcache_rag_kernels.rope import Rotation, rotate

if TYPE_CHECKING:
    from lmcache_rag_kernels.restore import Transform


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
    length = key.shape[1]
    positions = torch.arange(start, start + length, device=key.device)
    at = 0
    for layer, (stream, (k_count, v_count)) in enumerate(zip(streams, transform.counts.tolist(), strict=True)):
        own = slice(at, at + k_count + v_count)
        at = own.stop
        coordinates = rans.decode(stream, transform.distribution[own], transform.distributions, tokens)
        if coordinates is None:
            return layer
        wanted = coordinates[:, offset : offset + length].to(key.device).mT
        directions, mean = transform.directions[own].to(key.device), transform.mean[layer].to(key.device)
        k = torch.addmm(mean[0], wanted[:, :k_count], directions[:k_count]).view(key.shape[1:])
        v = torch.addmm(mean[1], wanted[:, k_count:], directions[k_count:]).view(key.shape[1:])
        rotation = rotations[layer]
        key[layer] = k if rotation is None else rotate(k, rotation, positions)
        value[layer] = v
    return None
