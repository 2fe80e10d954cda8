"""The codecs `high`, `balanced` and `small`: principal axes in the metric of the Fisher information,
one step for all coordinates, entropy coding. See `lmcache_rag.codec.tables`."""

from __future__ import annotations

import numpy as np
import torch
from lmcache_rag_kernels import CodedGroups, Rows, Transform, rans, restore
from torch import Tensor

from lmcache_rag.codec.base import Codec
from lmcache_rag.codec.tables import CodecTables, quantise
from lmcache_rag.errors import CorruptObjectError


class TransformCodec(Codec):
    """Coordinates in steps of `step`. A stream is that of `lmcache_rag_kernels.rans`: the coordinates of K's head
    groups, then of V's.

    Args:
        mean, size: of what is coded; without, those of K and V that `tables` have.
    """

    def __init__(
        self, tables: CodecTables, step: float, *, mean: np.ndarray | None = None, size: np.ndarray | None = None
    ) -> None:
        self._tables = tables
        self._step = step
        stored = tables.distribution((tables.size if size is None else size) / step)
        layers, _, head_groups, _, _ = tables.directions.shape
        counts = np.array([[len(own) for own in layer] for layer in stored], dtype=np.int64)
        self._all = Transform(
            counts=counts.reshape(layers, 2, head_groups),
            distribution=np.concatenate([own for layer in stored for own in layer]),
            directions=tables.backward,
            mean=torch.from_numpy(tables.mean if mean is None else mean),
            step=step,
            distributions=tables.distributions,
        )
        self._layers = [self._all.layer(index) for index in range(layers)]

    def encode(self, kv: Tensor) -> list[list[bytes | memoryview]]:
        by_layer = [self._encode(layer, own) for layer, own in enumerate(kv)]
        return [list(streams) for streams in zip(*by_layer, strict=True)]

    def restore(self, coded: CodedGroups, offset: int, rows: Rows) -> None:
        self._restore(coded, offset, rows)

    def _restore(
        self, coded: CodedGroups, offset: int, rows: Rows, residual: tuple[CodedGroups, Transform] | None = None
    ) -> None:
        failed = restore(coded, self._all, offset, rows, residual)
        if failed is not None:
            raise CorruptObjectError(f"layer {failed} cannot be one of {coded.tokens} tokens")

    def _encode(self, layer: int, kv: Tensor) -> list[bytes]:
        """The streams of a layer's groups."""
        own, forward = self._layers[layer], self._tables.forward[layer].flatten(0, 1)
        x = kv.flatten(2).float().cpu() - own.mean[0, :, None]
        by_group = x.unflatten(2, (-1, forward.shape[1])).permute(0, 2, 1, 3).flatten(0, 1)
        coordinates = torch.bmm(by_group, forward).mT
        stored = [part[:count] for part, count in zip(coordinates, own.counts.flatten(), strict=True)]
        symbols = quantise(torch.cat(stored), self._step)
        return rans.encode(symbols, own.distribution, own.distributions, self.group)
