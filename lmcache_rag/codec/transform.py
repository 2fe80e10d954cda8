"""The codec of the levels `high`, `balanced` and `small`: principal axes in the metric of the Fisher information,
one step for all coordinates, entropy coding. See `lmcache_rag.codec.tables`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from lmcache_rag_kernels import Rotation, Transform, rans, restore
from torch import Tensor

from lmcache_rag.codec.base import Codec
from lmcache_rag.codec.tables import CodecTables, quantise
from lmcache_rag.errors import CorruptObjectError


class TransformCodec(Codec):
    """Coordinates in steps of `step`. A layer's stream is that of `lmcache_rag_kernels.rans`: K's, then V's."""

    def __init__(self, tables: CodecTables, step: float) -> None:
        self._tables = tables
        self._step = step
        stored = tables.distribution(step)
        directions = [
            torch.from_numpy(rows[: len(own)].astype(np.float32)) * step
            for layer, owns in zip(tables.backward, stored, strict=True)
            for rows, own in zip(layer, owns, strict=True)
        ]
        self._all = Transform(
            counts=np.array([[len(k), len(v)] for k, v in stored], dtype=np.int64),
            distribution=np.concatenate([own for layer in stored for own in layer]),
            directions=torch.cat(directions),
            mean=torch.from_numpy(tables.mean),
            distributions=tables.distributions,
        )
        self._layers = [self._all.layer(index) for index in range(len(stored))]

    def encode_layer(self, layer: int, kv: Tensor) -> memoryview:
        own = self._layers[layer]
        x = kv.flatten(2).float().cpu() - own.mean[0, :, None]
        coordinates = torch.bmm(x, self._tables.forward[layer]).mT
        stored = [part[:count] for part, count in zip(coordinates, own.counts[0], strict=True)]
        symbols = quantise(torch.cat(stored), self._step)
        return memoryview(rans.encode(symbols, own.distribution, own.distributions))

    def decode_layer(self, layer: int, stream: memoryview, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        kv = torch.empty(2, *shape)
        if restore([stream], self._layers[layer], shape[0], 0, [None], 0, kv[:1], kv[1:]) is not None:
            raise CorruptObjectError(f"a coded layer that cannot be one of {shape[0]} tokens")
        return kv.to(dtype)

    def restore(
        self,
        streams: Sequence[memoryview],
        tokens: int,
        offset: int,
        rotations: Sequence[Rotation | None],
        start: int,
        key: Tensor,
        value: Tensor,
    ) -> None:
        failed = restore(streams, self._all, tokens, offset, rotations, start, key, value)
        if failed is not None:
            raise CorruptObjectError(f"layer {failed} cannot be one of {tokens} tokens")
