"""The C++ versions of `attend` (csrc/attend_kernel.cpp, and csrc/attend_amx.cpp for bfloat16), on the threads of
PyTorch's own OpenMP runtime."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from lmcache_rag_kernels.attend import _attend  # type: ignore[attr-defined]
except ImportError:  # installed without a C++ compiler
    _attend = None

MAX_HEAD_SIZE = 256
DTYPES = (torch.float32, torch.bfloat16)


def compiled() -> bool:
    """Whether the extension was built when this package was installed."""
    return _attend is not None


def instruction_sets(dtype: torch.dtype) -> list[str]:
    """The versions of the kernel that this machine can run on such tensors, the default first."""
    return _attend.instruction_sets(dtype == torch.bfloat16)


def openmp_runtime() -> str:
    """Path of the OpenMP library whose threads the kernel uses; empty where it starts threads of its own."""
    return _attend.openmp_runtime()


def supports(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, out: Tensor) -> bool:
    """Whether the kernel takes these tensors: on the CPU, of one dtype that it knows, and of a suitable head size."""
    tensors = (query, key, value, out)
    return (
        all(t.device.type == "cpu" and t.dtype == query.dtype and t.stride(-1) == 1 for t in tensors)
        and positions.device.type == "cpu"
        and query.dtype in DTYPES
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= MAX_HEAD_SIZE
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int | None,
    out: Tensor,
    mass: Tensor | None = None,
    isa: str = "",
) -> None:
    """Arguments as `reference.attend`; computes in float32 with `torch.get_num_threads()` threads, without the GIL. On
    AMX the softmax's weights are rounded to bfloat16.

    The calling thread keeps its work arrays for the next call: about 8 MiB, or K and V of one kv head as float32 where
    that is more.

    Args:
        mass: float32 `[tokens]`: how much attention each key gets, summed over queries and heads, is added to it. AMX
            does not tell.
        isa: one of `instruction_sets(dtype)`; empty for the best.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or positions are not ascending or not below `tokens`.
    """
    _attend.attend(
        query.detach(),
        key.detach(),
        value.detach(),
        positions.contiguous(),
        scale=scale,
        window=max(1, key.shape[0]) if window is None else window,
        out=out.detach(),
        mass=mass,
        threads=torch.get_num_threads(),
        isa=isa,
    )
