"""Coded K and V back to their place: entropy decoding, inverse transform, rotation, in one pass over all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lmcache_rag_kernels.rans import Distributions
from lmcache_rag_kernels.restore import cpu, reference
from lmcache_rag_kernels.restore.coded import CodedGroups
from lmcache_rag_kernels.rows import Rows

__all__ = ["CodedGroups", "Transform", "restore"]

_SUMMED_TOKENS = 512
"""So many tokens are added up at once, a multiple of every group: fewer take longer, more take more memory."""


@dataclass(frozen=True, eq=False)
class Transform:
    """How a model's K and V are coded. A layer's heads are in groups of `width` channels, coded with a matrix each.

    Attributes:
        counts: int64 `[layers, 2, head groups]`: how many coordinates of K and V are stored.
        distribution: uint8 `[coordinates]`: the distribution of each, layer by layer, K's before V's.
        directions: float32 `[layers, 2, head groups, width, width]`, of values that float16 holds: what coordinate i
            adds to K or V is row i.
        mean: float32 `[layers, 2, channels]`.
        step: what coordinates are stored in multiples of.
    """

    counts: np.ndarray
    distribution: np.ndarray
    directions: Tensor
    mean: Tensor
    step: float
    distributions: Distributions

    def layer(self, index: int) -> Transform:
        """Of one layer alone."""
        start, count = int(self.counts[:index].sum()), int(self.counts[index].sum())
        own = slice(index, index + 1)
        return Transform(
            self.counts[own],
            self.distribution[start : start + count],
            self.directions[own],
            self.mean[own],
            self.step,
            self.distributions,
        )


def restore(
    coded: CodedGroups,
    transform: Transform,
    offset: int,
    rows: Rows,
    added: tuple[CodedGroups, Transform] | None = None,
) -> int | None:
    """Write stored tokens, from `offset` on, to as many rows; only the groups that hold them are decoded.

    Args:
        coded: streams of `rans`, of the int16 coordinates of a group's tokens, K's and then V's.
        added: what is added to K and V before K is rotated: a residual of the same tokens.

    On CPUs C++ restores, to float32, bfloat16 or float16; on CUDA Triton. Other devices and types, and interleaved
    rotations on CPUs, take the PyTorch reference. C++ adds up coordinates, where both have the same directions and
    groups, so that a sum takes one inverse transform; all else adds K and V, in float32.

    Returns:
        A layer of which a stream does not fit; None where all was restored, or `rows.verdicts` will say.

    Raises:
        ValueError: the tokens are not among those of `coded`, or shapes do not fit each other.
    """
    if added is not None and not (cpu.fits(rows) and _alike((coded, transform), added)):
        return _sum((coded, transform), added, offset, rows)
    if cpu.fits(rows):
        return cpu.restore(coded, transform, offset, rows, added)
    if rows.key.is_cuda:
        from lmcache_rag_kernels.restore import cuda

        if cuda.fits(rows):
            return cuda.restore(coded, transform, offset, rows)
    return reference.restore(coded, transform, offset, rows)


def _alike(first: tuple[CodedGroups, Transform], second: tuple[CodedGroups, Transform]) -> bool:
    """Whether coordinates can be added up."""
    (coded, transform), (other, by) = first, second
    groups = [(own.tokens, own.group, own.first, len(own.places)) for own in (coded, other)]
    return groups[0] == groups[1] and transform.directions is by.directions


def _sum(
    first: tuple[CodedGroups, Transform], second: tuple[CodedGroups, Transform], offset: int, rows: Rows
) -> int | None:
    """RoPE is linear: both are restored, then added, in float32."""
    end = offset + rows.length
    starts = [offset, *range((offset // _SUMMED_TOKENS + 1) * _SUMMED_TOKENS, end, _SUMMED_TOKENS)]
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        here = rows.part(slice(None), slice(start - offset, stop - offset))
        room = torch.empty(4, *here.key.shape, device=here.key.device)
        for own, (key, value) in ((first, room[:2]), (second, room[2:])):
            failed = restore(*own, start, replace(here, key=key, value=value))
            if failed is not None:
                return failed
        torch.add(room[0], room[2], out=here.key)
        torch.add(room[1], room[3], out=here.value)
    return None
