"""What a codec does: one layer's K and V to a stream of bytes and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Codec(Protocol):
    """One way to write K and V as bytes. Layers are coded one by one, so that they can be read one by one."""

    def encode_layer(self, layer: int, kv: Tensor) -> memoryview:
        """Bytes of one layer's `[2, tokens, kv_heads, head_size]`; K is position-free."""
        ...

    def decode_layer(self, layer: int, stream: memoryview, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """`[2, tokens, kv_heads, head_size]` from bytes; `shape` is (tokens, kv_heads, head_size).

        The result may be a view of `stream`. Raises `CorruptObjectError` where the stream does not fit the shape.
        """
        ...
