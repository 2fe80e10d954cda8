"""What a codec does: K and V to streams of bytes, one a layer, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_rag.chunk_kv import place_layers

if TYPE_CHECKING:
    import torch
    from lmcache_rag_kernels import Rotation
    from torch import Tensor


class Codec(ABC):
    """One way to write K and V as bytes. K is position-free."""

    @abstractmethod
    def encode_layer(self, layer: int, kv: Tensor) -> memoryview:
        """Bytes of one layer's `[2, tokens, kv_heads, head_size]`."""

    @abstractmethod
    def decode_layer(self, layer: int, stream: memoryview, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """`[2, tokens, kv_heads, head_size]` from bytes; `shape` is (tokens, kv_heads, head_size).

        The result may be a view of `stream`. Raises `CorruptObjectError` where the stream does not fit the shape.
        """

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
        """From all layers' streams of so many tokens, write those from `offset` on to `key` and `value`
        `[layers, length, kv_heads, head_size]`, K rotated to positions from `start` on.

        Raises:
            CorruptObjectError: a stream does not fit the shape.
        """
        shape = (tokens, key.shape[2], key.shape[3])
        layers = (self.decode_layer(index, stream, shape, key.dtype) for index, stream in enumerate(streams))
        place_layers(layers, offset, rotations, start, key, value)
