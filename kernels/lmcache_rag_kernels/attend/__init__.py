"""Dense causal attention of queries at scattered positions: in C++ on CPUs, in Triton on CUDA, in PyTorch
elsewhere."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from lmcache_rag_kernels.attend import cpu, reference

__all__ = ["attend", "attend_weighing"]

logger = logging.getLogger(__name__)

_WORTH_PACKING = 32
"""Queries that weigh keys."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float, window: int | None, out: Tensor
) -> None:
    """Causal attention of queries at `positions` over keys at positions 0, 1, ...

    Args:
        query: `[queries, heads, head_size]`, RoPE applied. float32 or bfloat16 on a CPU, and a head size that is a
            multiple of 8 up to 256, take the C++ kernel; these and float16 on CUDA, and a head size up to 256, the
            Triton kernel; all else is computed by PyTorch.
        key, value: `[tokens, kv_heads, head_size]`; row i is position i. Head h of the query sees kv head
            `h // (heads // kv_heads)`.
        positions: int64 `[queries]`, ascending, each below `tokens`.
        window: a query sees its own position and the `window - 1` before it; None for all.
        out: `[queries, heads, head_size]`, written.

    Raises:
        ValueError: (C++ kernel) shapes do not fit each other, or positions are not as above.
    """
    if cpu.supports(query, key, value, positions, out):
        if cpu.compiled():
            cpu.attend(query, key, value, positions, scale=scale, window=window, out=out)
            return
        _say_not_compiled()
    if query.is_cuda:
        from lmcache_rag_kernels.attend import cuda

        if cuda.fits(query, key, value, positions, out):
            cuda.attend(query, key, value, positions, scale=scale, window=window, out=out)
            return
    reference.attend(query, key, value, positions, scale=scale, window=window, out=out)


def attend_weighing(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float, window: int | None, out: Tensor
) -> Tensor:
    """`attend`, which also returns how much attention each key gets, summed over queries and heads.

    For a few queries, such as a question's: see `attend` for which version computes it. On CPUs the C++ kernel takes
    half of PyTorch's time from 32 queries on, since it packs the keys first; not in bfloat16 where PyTorch has AMX.

    Returns:
        float32 `[tokens]`.
    """
    if cpu.supports(query, key, value, positions, out) and cpu.compiled() and _is_worth_packing(query):
        mass = torch.zeros(len(key), dtype=torch.float32)
        cpu.attend(query, key, value, positions, scale=scale, window=window, out=out, mass=mass)
        return mass
    if query.is_cuda:
        from lmcache_rag_kernels.attend import cuda

        if cuda.fits(query, key, value, positions, out):
            return cuda.attend_weighing(query, key, value, positions, scale=scale, window=window, out=out)
    return reference.attend_weighing(query, key, value, positions, scale=scale, window=window, out=out)


def _is_worth_packing(query: Tensor) -> bool:
    return len(query) >= _WORTH_PACKING and "amx" not in cpu.instruction_sets(query.dtype)


@functools.cache
def _say_not_compiled() -> None:
    logger.warning(
        "The C++ attention kernel is not compiled, so PyTorch computes attention, about three times slower. "
        "Install a C++ compiler (GCC or Clang) and reinstall lmcache-rag-kernels."
    )
