"""What a codec does: K and V to streams of bytes, one for each layer of each group of tokens, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from lmcache_rag.chunk_kv import TOGETHER, place

if TYPE_CHECKING:
    import torch
    from lmcache_rag_kernels import CodedGroups, Rows
    from torch import Tensor

GROUP_TOKENS = 64
"""Four times the entropy coder's sixteen lanes, whose states cost a group 1% of its bytes at `balanced`."""


class Codec(ABC):
    """One way to write K and V as bytes. K is position-free.

    Attributes:
        group: so many tokens are coded apart from others, the last ones of a chunk perhaps fewer.
    """

    group: ClassVar[int] = GROUP_TOKENS

    @abstractmethod
    def encode(self, kv: Tensor) -> list[list[bytes | memoryview]]:
        """Of each group the streams of its layers, from `[layers, 2, tokens, kv_heads, head_size]`."""

    @abstractmethod
    def restore(self, coded: CodedGroups, offset: int, rows: Rows) -> None:
        """Write the chunk's tokens from `offset` on to as many rows. Only the groups that hold them are decoded.

        Raises:
            CorruptObjectError: a stream does not fit the shape.
            ValueError: `coded` does not hold the tokens.
        """

    def decode(self, coded: CodedGroups, heads: int, size: int, dtype: torch.dtype) -> Tensor:
        """All tokens that `coded` holds, `[layers, 2, tokens, kv_heads, head_size]`. Raises `CorruptObjectError`."""
        import torch
        from lmcache_rag_kernels import Rows

        begin, end = coded.span(0)[0], coded.span(len(coded.places) - 1)[1]
        kv = torch.empty(coded.layers, 2, end - begin, heads, size, dtype=dtype)
        key, value = kv.unbind(1)
        self.restore(coded, begin, Rows(key, value, 0, [None] * coded.layers))
        return kv


class GroupCodec(Codec):
    """A codec that makes all layers' K and V of a group before they are placed."""

    @abstractmethod
    def encode_group(self, kv: Tensor) -> list[bytes | memoryview]:
        """The streams of the layers `[layers, 2, tokens, kv_heads, head_size]`, of no more tokens than a group has."""

    @abstractmethod
    def decode_group(self, coded: CodedGroups, group: int, heads: int, size: int, dtype: torch.dtype) -> Tensor:
        """One of the groups in `coded`, `[layers, 2, tokens, kv_heads, head_size]`, perhaps a view of its bytes. Raises
        `CorruptObjectError`."""

    def encode(self, kv: Tensor) -> list[list[bytes | memoryview]]:
        return [self.encode_group(part) for part in kv.split(self.group, dim=2)]

    def restore(self, coded: CodedGroups, offset: int, rows: Rows) -> None:
        layers, length, heads, size = rows.key.shape
        most = max(1, TOGETHER // (self.group * heads * size))
        for own in (slice(layer, layer + most) for layer in range(0, layers, most)):
            streams = replace(coded, places=coded.places[:, own])
            for group in coded.holding(offset, length):
                begin, end = coded.span(group)
                kv = self.decode_group(streams, group, heads, size, rows.key.dtype)
                first, last = max(begin, offset), min(end, offset + length)
                here = slice(first - offset, last - offset)
                wanted = kv[:, :, first - begin : last - begin]
                place(wanted, rows.part(own, here))
