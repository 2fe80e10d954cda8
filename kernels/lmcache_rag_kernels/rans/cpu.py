"""The C++ version (csrc/rans_kernel.cpp)."""

from __future__ import annotations

import numpy as np

try:
    from lmcache_rag_kernels.rans import _rans  # type: ignore[attr-defined]
except ImportError:  # installed without a C++ compiler
    _rans = None


def compiled() -> bool:
    """Whether the extension was built when this package was installed."""
    return _rans is not None


def instruction_sets() -> list[str]:
    """The versions of the decoder that this machine can run, the default first."""
    return _rans.instruction_sets()


def encode(symbols: np.ndarray, distribution: np.ndarray, frequencies: np.ndarray, group: int) -> list[bytes]:
    """Arguments as `reference.encode`, so many rows a stream; without the GIL."""
    return _rans.encode(symbols, distribution, frequencies, group)


def decode(
    data: np.ndarray,
    distribution: np.ndarray,
    slots: np.ndarray,
    symbols: int,
    out: np.ndarray,
    *,
    isa: str = "",
) -> bool:
    """Arguments as `reference.decode`; without the GIL. `isa` is one of `instruction_sets()`, empty for the best."""
    return _rans.decode(data, distribution, slots, symbols, out, isa=isa)
