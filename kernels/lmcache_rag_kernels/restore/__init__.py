"""Coded K and V back to their place: entropy decoding, inverse transform, rotation, in one pass over all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lmcache_rag_kernels.rans import Distributions
from lmcache_rag_kernels.restore import cpu, reference
from lmcache_rag_kernels.rope import Rotation

__all__ = ["Transform", "restore"]


@dataclass(frozen=True, eq=False)
class Transform:
    """How a model's K and V are coded, C being heads * head_size.

    Attributes:
        counts: int64 `[layers, 2]`: how many coordinates K and V have in each layer.
        distribution: uint8 `[coordinates]`: the distribution of each, layer by layer, K's before V's.
        directions: float32 `[coordinates, C]`: what one step of each coordinate adds to K or V.
        mean: float32 `[layers, 2, C]`.
    """

    counts: np.ndarray
    distribution: np.ndarray
    directions: Tensor
    mean: Tensor
    distributions: Distributions

    def layer(self, index: int) -> Transform:
        """Of one layer alone."""
        start, count = int(self.counts[:index].sum()), int(self.counts[index].sum())
        own = slice(start, start + count)
        return Transform(
            self.counts[index : index + 1],
            self.distribution[own],
            self.directions[own],
            self.mean[index : index + 1],
            self.distributions,
        )


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
    """Write stored tokens, from `offset` on, as many as `key` has.

    Args:
        streams: of `rans`, one a layer; int16 coordinates of so many `tokens`, K's and then V's.
        rotations: of each layer's K, for positions from `start` on.
        key, value: `[layers, length, heads, head_size]`, written; strided, but a token's channels lie in a row.

    On CPUs C++ restores, on CUDA Triton; other devices, compute types on CPUs and interleaved rotations there take the
    PyTorch reference.

    Returns:
        A layer whose stream does not fit; None where all was restored.
    """
    arguments = (streams, transform, tokens, offset, rotations, start, key, value)
    if cpu.fits(key, rotations):
        return cpu.restore(*arguments)
    if key.is_cuda:
        from lmcache_rag_kernels.restore import cuda

        if cuda.fits(key, rotations):
            return cuda.restore(*arguments)
    return reference.restore(*arguments)
