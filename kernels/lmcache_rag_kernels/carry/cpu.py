"""The C++ version (csrc/carry_module.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lmcache_rag_kernels.carry import reference
from lmcache_rag_kernels.carry.lesson import Lesson
from lmcache_rag_kernels.rope import Rotation

try:
    from lmcache_rag_kernels.carry import _carry  # type: ignore[attr-defined]
except ImportError:  # installed without a C++ compiler
    _carry = None

_NOTHING = np.zeros((0, 0), np.float32)


def compiled() -> bool:
    """Whether the extension was built when this package was installed."""
    return _carry is not None


def instruction_sets() -> list[str]:
    """The versions of the kernel that this machine can run, the default first."""
    return _carry.instruction_sets()


class Carrier:
    """See `lmcache_rag_kernels.carry.Carrier`; without the GIL, in float32, rows shared out among PyTorch's threads. Of
    other types than float32 and bfloat16, and where pairs are interleaved, the reference does it.

    Args:
        isa: one of `instruction_sets()`, empty for the best.

    Raises:
        ValueError: when called: rows, angles and weights do not fit each other, or a token's channels do not lie in a
            row.
    """

    def __init__(self, lessons: Sequence[Lesson], *, isa: str = "") -> None:
        self._reference = reference.Carrier(lessons)
        self._taught = np.concatenate([lesson.taught.numpy() for lesson in lessons])
        self._lessons = [(lesson.rows.start, lesson.rows.stop, lesson.weights.numpy()) for lesson in lessons]
        self._isa = isa

    def __call__(
        self, key: Tensor, value: Tensor, key_before: Tensor, value_before: Tensor, rotation: Rotation | None
    ) -> None:
        interleaved = rotation is not None and rotation.interleaved
        types = {rows.dtype for rows in (key, value, key_before, value_before)}
        if interleaved or types not in ({torch.float32}, {torch.bfloat16}):
            self._reference(key, value, key_before, value_before, rotation)
            return
        _carry.carry(
            *(_as_numpy(rows) for rows in (key, value, key_before, value_before)),
            self._taught,
            self._lessons,
            _NOTHING if rotation is None else rotation.cos.numpy(),
            _NOTHING if rotation is None else rotation.sin.numpy(),
            key.dtype == torch.bfloat16,
            torch.get_num_threads(),
            isa=self._isa,
        )


def _as_numpy(rows: Tensor) -> np.ndarray:
    """The same memory; NumPy has no bfloat16."""
    return (rows if rows.dtype == torch.float32 else rows.view(torch.uint16)).numpy()
