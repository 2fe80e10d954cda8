"""The codec of the levels `high`, `balanced` and `small`: principal axes in the metric of the Fisher information,
one step for all coordinates, entropy coding. See `lmcache_rag.codec.tables`."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from lmcache_rag_kernels import rans
from torch import Tensor

from lmcache_rag.codec.tables import CodecTables, quantise
from lmcache_rag.errors import CorruptObjectError

STEPS: Final = {"high": 0.15, "balanced": 0.26, "small": 0.6}
"""Quantiser step by level, in units of the tables' coordinates."""


class TransformCodec:
    """One level for one model. A layer's stream is that of `lmcache_rag_kernels.rans`: K's coordinates, then V's."""

    def __init__(self, tables: CodecTables, step: float) -> None:
        self._tables = tables
        self._step = step
        self._distribution = tables.distribution(step)
        self._mean = torch.from_numpy(tables.mean)
        self._backward = [
            tuple(
                torch.from_numpy(rows[: len(kept)].astype(np.float32)) * step
                for rows, kept in zip(layer, distribution, strict=True)
            )
            for layer, distribution in zip(tables.backward, self._distribution, strict=True)
        ]

    def encode_layer(self, layer: int, kv: Tensor) -> memoryview:
        """Bytes of one layer's `[2, tokens, kv_heads, head_size]`."""
        distribution = self._distribution[layer]
        symbols = [
            quantise(
                ((kv[part].flatten(1).float().cpu() - self._mean[layer, part]) @ self._tables.forward[layer, part]).T[
                    : len(distribution[part])
                ],
                self._step,
            )
            for part in range(2)
        ]
        return memoryview(rans.encode(torch.cat(symbols), np.concatenate(distribution), self._tables.distributions))

    def decode_layer(self, layer: int, stream: memoryview, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """`[2, tokens, kv_heads, head_size]` from bytes; `shape` is (tokens, kv_heads, head_size).

        Raises:
            CorruptObjectError: the stream does not fit the shape.
        """
        tokens, heads, size = shape
        k, _ = self._distribution[layer]
        steps = rans.decode(stream, np.concatenate(self._distribution[layer]), self._tables.distributions, tokens)
        if steps is None:
            raise CorruptObjectError(f"a coded layer that cannot be one of {tokens} tokens")
        kv = torch.empty(2, tokens, heads * size)
        for part, rows in enumerate((steps[: len(k)], steps[len(k) :])):
            torch.addmm(self._mean[layer, part], rows.T, self._backward[layer][part], out=kv[part])
        return kv.view(2, tokens, heads, size).to(dtype)
