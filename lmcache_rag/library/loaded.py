"""What was read from a store of one variant of a chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lmcache_rag.chunk_kv import KVShape
from lmcache_rag.codec import Codec, StoredObject

if TYPE_CHECKING:
    import torch
    from lmcache_rag_kernels import Rows
    from torch import Tensor


class LoadedKV:
    """One stored variant of a chunk, decoded when it is wanted.

    Args:
        size_bytes: read for it.
        base: what a residual is added to.
    """

    def __init__(
        self, stored: StoredObject, shape: KVShape, codec: Codec, size_bytes: int, base: LoadedKV | None = None
    ) -> None:
        self.size_bytes: int = size_bytes + (base.size_bytes if base is not None else 0)
        self._stored = stored
        self._shape = shape
        self._codec = codec
        self._base = base

    @property
    def tokens(self) -> int:
        return self._stored.header.tokens

    @property
    def token_ids(self) -> np.ndarray:
        """All of the chunk's, int32."""
        return self._stored.token_ids

    @property
    def codec(self) -> str:
        """The name of the one that it was stored in; of a residual, that of its base."""
        return self._stored.header.codec if self._base is None else self._base.codec

    @property
    def checksum(self) -> int:
        """Of the object."""
        return self._stored.checksum

    def place(self, offset: int, rows: Rows) -> None:
        """See `ChunkKV.place`. Raises `CorruptObjectError`."""
        if self._base is None:
            self._codec.restore(self._stored.coded, offset, rows)
        else:
            self._place_sum(self._base, offset, rows)

    def kv(self, dtype: torch.dtype | None = None) -> Tensor:
        """Of the tokens that were read, as `ChunkKV.kv`, by default in its dtype. Raises `CorruptObjectError`."""
        import torch
        from lmcache_rag_kernels import Rows

        shape, coded = self._shape, self._stored.coded
        dtype = dtype or shape.dtype
        if self._base is None:
            return self._codec.decode(coded, shape.kv_heads, shape.head_size, dtype)
        begin, end = coded.span(0)[0], coded.span(len(coded.places) - 1)[1]
        kv = torch.empty(shape.layers, 2, end - begin, shape.kv_heads, shape.head_size, dtype=dtype)
        self.place(begin, Rows(kv[:, 0], kv[:, 1], 0, [None] * shape.layers))
        return kv

    def _place_sum(self, base: LoadedKV, offset: int, rows: Rows) -> None:
        """Group by group, so that what is added up stays in the cache. RoPE is linear: both are turned, then added."""
        import torch

        layers, length, heads, size = rows.key.shape
        room = torch.empty(4, layers, min(length, self._codec.group), heads, size, device=rows.key.device)
        for group in self._stored.coded.holding(offset, length):
            first, end = self._stored.coded.span(group)
            own = slice(max(first, offset) - offset, min(end, offset + length) - offset)
            here = rows.part(slice(None), own)
            key, value, *others = room[:, :, : own.stop - own.start]
            summands = [replace(here, key=key, value=value), replace(here, key=others[0], value=others[1])]
            for loaded, to in zip((base, self), summands, strict=True):
                loaded._codec.restore(loaded._stored.coded, own.start + offset, to)
            torch.add(summands[0].key, summands[1].key, out=here.key)
            torch.add(summands[0].value, summands[1].value, out=here.value)
