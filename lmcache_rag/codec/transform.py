"""The codec of the levels `high`, `balanced` and `small`: principal axes in the metric of the Fisher information,
one step for all coordinates, entropy coding. See `lmcache_rag.codec.tables`."""

from __future__ import annotations

import numpy as np
import torch
from lmcache_rag_kernels import rans
from torch import Tensor

from lmcache_rag.codec.tables import CodecTables, quantise
from lmcache_rag.errors import CorruptObjectError


class TransformCodec:
    """Coordinates in steps of `step`. A layer's stream is that of `lmcache_rag_kernels.rans`: K's, then V's."""

    def __init__(self, tables: CodecTables, step: float) -> None:
        self._tables = tables
        self._step = step
        self._mean = torch.from_numpy(tables.mean)
        stored = tables.distribution(step)
        self._counts = [(len(k), len(v)) for k, v in stored]
        self._distribution = [np.concatenate(layer) for layer in stored]
        self._backward = [
            tuple(torch.from_numpy(rows[:count].astype(np.float32)) * step for rows, count in zip(*layer, strict=True))
            for layer in zip(tables.backward, self._counts, strict=True)
        ]

    def encode_layer(self, layer: int, kv: Tensor) -> memoryview:
        """Bytes of one layer's `[2, tokens, kv_heads, head_size]`."""
        x = kv.flatten(2).float().cpu() - self._mean[layer, :, None]
        coordinates = torch.bmm(x, self._tables.forward[layer]).mT
        stored = [part[:count] for part, count in zip(coordinates, self._counts[layer], strict=True)]
        symbols = quantise(torch.cat(stored), self._step)
        return memoryview(rans.encode(symbols, self._distribution[layer], self._tables.distributions))

    def decode_layer(self, layer: int, stream: memoryview, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """`[2, tokens, kv_heads, head_size]` from bytes; `shape` is (tokens, kv_heads, head_size).

        Raises:
            CorruptObjectError: the stream does not fit the shape.
        """
        tokens, heads, size = shape
        steps = rans.decode(stream, self._distribution[layer], self._tables.distributions, tokens)
        if steps is None:
            raise CorruptObjectError(f"a coded layer that cannot be one of {tokens} tokens")
        kv = torch.empty(2, tokens, heads * size)
        for part, rows in enumerate(steps.split(self._counts[layer])):
            torch.addmm(self._mean[layer, part], rows.T, self._backward[layer][part], out=kv[part])
        return kv.view(2, tokens, heads, size).to(dtype)
