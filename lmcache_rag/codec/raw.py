"""Raw floats in the model's dtype: lossless, no work to read."""

from __future__ import annotations

import torch
from lmcache_rag_kernels import CodedGroups
from torch import Tensor

from lmcache_rag.codec.base import GroupCodec
from lmcache_rag.codec.fixed import from_streams, to_streams


class RawCodec(GroupCodec):
    """A stream is K's bytes, then V's."""

    def encode_group(self, kv: Tensor) -> list[bytes | memoryview]:
        return to_streams(kv.detach().cpu().contiguous().flatten(1).view(torch.uint8))

    def decode_group(self, coded: CodedGroups, group: int, heads: int, size: int, dtype: torch.dtype) -> Tensor:
        begin, end = coded.span(group)
        shape = (2, end - begin, heads, size)
        streams = from_streams(coded, group, 2 * (end - begin) * heads * size * dtype.itemsize)
        return streams.view(dtype).unflatten(1, shape)
