"""Raw floats in the model's dtype: lossless, no work to read."""

from __future__ import annotations

import torch
from torch import Tensor

from lmcache_rag.codec.base import Codec
from lmcache_rag.errors import CorruptObjectError


class RawCodec(Codec):
    """K's bytes, then V's."""

    def encode_group(self, layer: int, kv: Tensor) -> memoryview:
        data = kv.detach().cpu().contiguous().view(torch.uint8).numpy()
        return memoryview(data).cast("B")  # type: ignore[arg-type]  # numpy's arrays are buffers from Python 3.12 on

    def decode_group(self, layer: int, stream: memoryview, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        tokens, heads, size = shape
        if len(stream) != 2 * tokens * heads * size * dtype.itemsize:
            raise CorruptObjectError(f"a raw layer of shape {shape} in {dtype} cannot have {len(stream)} bytes")
        return torch.frombuffer(stream, dtype=dtype).view(2, tokens, heads, size)
