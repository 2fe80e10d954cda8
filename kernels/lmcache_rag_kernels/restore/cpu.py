"""The C++ version (csrc/restore_kernel.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmcache_rag_kernels.restore import Transform
    from lmcache_rag_kernels.restore.coded import CodedGroups
    from lmcache_rag_kernels.rows import Rows

try:
    from lmcache_rag_kernels.restore import _restore  # type: ignore[attr-defined]
except ImportError:  # installed without a C++ compiler
    _restore = None

_NOTHING = np.zeros((0, 0), np.float32)
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def fits(rows: Rows) -> bool:
    """Whether the extension was built, and is for tensors like these."""
    return (
        _restore is not None
        and rows.key.device.type == "cpu"
        and rows.key.dtype in _TYPES
        and not any(rotation is not None and rotation.interleaved for rotation in rows.rotations)
    )


def instruction_sets() -> list[str]:
    """The versions of the kernel that this machine can run, the default first."""
    return _restore.instruction_sets()


def restore(
    coded: CodedGroups,
    transform: Transform,
    offset: int,
    rows: Rows,
    added: tuple[CodedGroups, Transform] | None = None,
    *,
    isa: str = "",
) -> int | None:
    """See `lmcache_rag_kernels.restore.restore`; without the GIL, each layer's groups shared out among the threads.

    Args:
        added: of the same groups and directions.
        isa: one of `instruction_sets()`, empty for the best.
    """
    positions = slice(rows.start, rows.start + rows.length)
    angles = [
        (_NOTHING, _NOTHING) if rotation is None else (rotation.cos[positions].numpy(), rotation.sin[positions].numpy())
        for rotation in rows.rotations
    ]
    failed = _restore.restore(
        [_coding(*own) for own in ((coded, transform), added) if own is not None],
        transform.directions.numpy(),
        [cos for cos, _ in angles],
        [sin for _, sin in angles],
        _as_numpy(rows.key),
        _as_numpy(rows.value),
        coded.tokens,
        coded.group,
        coded.first,
        offset,
        torch.get_num_threads(),
        _TYPES[rows.key.dtype],
        isa=isa,
    )
    return None if failed < 0 else failed


def _coding(coded: CodedGroups, transform: Transform) -> tuple[Any, ...]:
    distributions = transform.distributions
    return (
        np.frombuffer(coded.data, np.uint8),
        coded.places,
        transform.distribution,
        transform.counts,
        distributions.slots,
        distributions.frequencies.shape[1],
        transform.step,
        transform.mean.numpy(),
    )


def _as_numpy(rows: Tensor) -> np.ndarray:
    """The same memory; NumPy has no bfloat16."""
    return (rows if rows.dtype == torch.float32 else rows.view(torch.uint16)).numpy()
