"""Carrying a change over: in each layer, what changed in a chunk's taught tokens is added to its other tokens, weighed.

In C++ on CPUs, on CUDA in Triton, all chunks at once; elsewhere in PyTorch, a product for each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lmcache_rag_kernels.carry import cpu, reference
from lmcache_rag_kernels.carry.lesson import Lesson
from lmcache_rag_kernels.rope import Rotation

__all__ = ["Carrier", "Lesson", "carrier"]


class Carrier(Protocol):
    """Of some chunks, one layer after another."""

    def __call__(
        self, key: Tensor, value: Tensor, key_before: Tensor, value_before: Tensor, rotation: Rotation | None
    ) -> None:
        """Add to the chunks' rows of a layer what follows from the change of their taught rows.

        Args:
            key, value: `[tokens, kv_heads, head_size]`, RoPE applied to K; row i is position i.
            key_before, value_before: `[taught, kv_heads, head_size]`: what the taught rows of all chunks, one chunk's
                after another's, held before.
            rotation: this layer's RoPE; changes are compared without it.
        """
        ...


def carrier(lessons: Sequence[Lesson]) -> Carrier:
    """For these chunks, of which there is one at least; they do not overlap."""
    if lessons[0].weights.is_cuda:
        from lmcache_rag_kernels.carry import cuda

        return cuda.Carrier(lessons)
    if lessons[0].weights.device.type == "cpu" and cpu.compiled():
        return cpu.Carrier(lessons)
    return reference.Carrier(lessons)
