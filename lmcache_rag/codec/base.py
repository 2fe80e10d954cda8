"""What a codec does: K and V to streams of bytes, one for each layer of each group of tokens, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from lmcache_rag_kernels import CodedGroups, Rotation
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
    def encode_group(self, layer: int, kv: Tensor) -> bytes | memoryview:
        """The stream of one layer's `[2, tokens, kv_heads, head_size]`, of no more tokens than a group has."""

    @abstractmethod
    def decode_group(self, layer: int, stream: memoryview, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """`[2, tokens, kv_heads, head_size]` from a stream; `shape` is (tokens, kv_heads, head_size).

        The result may be a view of `stream`. Raises `CorruptObjectError` where the stream does not fit the shape.
        """

    def encode_layer(self, layer: int, kv: Tensor) -> Sequence[bytes | memoryview]:
        """The streams of one layer's `[2, tokens, kv_heads, head_size]`, a group each."""
        return [self.encode_group(layer, part) for part in kv.split(self.group, dim=1)]

    def decode_layer(self, layer: int, coded: CodedGroups, heads: int, size: int, dtype: torch.dtype) -> Tensor:
        """One layer of all tokens that `coded` holds, `[2, tokens, kv_heads, head_size]`. Raises
        `CorruptObjectError`."""
        import torch

        decoded = []
        for group in range(len(coded.places)):
            begin, end = coded.span(group)
            decoded.append(self.decode_group(layer, coded.stream(group, layer), (end - begin, heads, size), dtype))
        return torch.cat(decoded, dim=1)

    def restore(
        self,
        coded: CodedGroups,
        offset: int,
        rotations: Sequence[Rotation | None],
        start: int,
        key: Tensor,
        value: Tensor,
    ) -> None:
        """Of the chunk's tokens write those from `offset` on to `key` and `value`
        `[layers, length, kv_heads, head_size]`, K rotated to positions from `start` on. Only the groups that hold them
        are decoded.

        Raises:
            CorruptObjectError: a stream does not fit the shape.
            ValueError: `coded` does not hold the tokens.
        """
        import torch
        from lmcache_rag_kernels import rotate

        length = key.shape[1]
        positions = torch.arange(start, start + length, device=key.device)
        for layer, rotation in enumerate(rotations):
            for group in coded.holding(offset, length):
                begin, end = coded.span(group)
                stream = coded.stream(group, layer)
                rows = self.decode_group(layer, stream, (end - begin, key.shape[2], key.shape[3]), key.dtype)
                first, last = max(begin, offset), min(end, offset + length)
                here = slice(first - offset, last - offset)
                key[layer, here], value[layer, here] = rows[:, first - begin : last - begin]
            if rotation is not None:
                rotate(key[layer], rotation, positions, out=key[layer])
