"""Entropy coding of matrices of small integers, each column with a distribution known beforehand.

Interleaved range asymmetric numeral systems (Duda 2013, https://arxiv.org/abs/1311.2540): within 1% of the entropy, and
sixteen rows are decoded at once. In C++ on CPUs; without a compiler, in NumPy.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmcache_rag_kernels.rans import cpu, reference
from lmcache_rag_kernels.rans.reference import PROBABILITY_BITS

__all__ = ["PROBABILITY_BITS", "Distributions", "decode", "encode"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distributions:
    """What columns are coded with.

    Attributes:
        frequencies: uint16 `[distributions, symbols]`, each row adding up to 4096. Of an even number of symbols, 256 at
            most, symbol i stands for the integer `i - (symbols - 2) // 2`, and the last one, whose frequency must not
            be 0, is the escape: integers that the others do not cover follow it as they are.
    """

    frequencies: np.ndarray

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """The decoding tables, uint32 `[distributions, 4096]`: symbol 8 bits, frequency 12, offset 12."""
        return reference.slot_table(self.frequencies)


def encode(symbols: Tensor, distribution: np.ndarray, distributions: Distributions, group: int) -> list[bytes]:
    """Code a matrix, so many rows at a time, each group of them apart: their streams.

    Args:
        symbols: int16 `[columns, rows]`.
        distribution: uint8 `[columns]`: which distribution each column has.

    Raises:
        ValueError: shapes do not fit each other, or the frequencies are not as `Distributions` says.
    """
    matrix = symbols.contiguous().numpy()
    if cpu.compiled():
        return cpu.encode(matrix, distribution, distributions.frequencies, group)
    _say_not_compiled()
    return [
        reference.encode(matrix[:, row : row + group], distribution, distributions.frequencies)
        for row in range(0, matrix.shape[1], group)
    ]


def decode(data: memoryview, distribution: np.ndarray, distributions: Distributions, rows: int) -> Tensor | None:
    """A stream's matrix, as float32 `[columns, rows]`; None where `data` is not one of this shape."""
    out = torch.empty(len(distribution), rows)
    version = cpu if cpu.compiled() else reference
    if version is reference:
        _say_not_compiled()
    read = np.frombuffer(data, np.uint8)
    return (
        out
        if version.decode(read, distribution, distributions.slots, distributions.frequencies.shape[1], out.numpy())
        else None
    )


@functools.cache
def _say_not_compiled() -> None:
    logger.warning(
        "The C++ entropy coder is not compiled, so NumPy codes, about fifty times slower. "
        "Install a C++ compiler (GCC or Clang) and reinstall lmcache-rag-kernels."
    )
