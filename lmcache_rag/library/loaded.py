"""What was read from a store of one variant of a chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from lmcache_rag.chunk_kv import KVShape
from lmcache_rag.codec import Codec, StoredObject

if TYPE_CHECKING:
    import torch
    from lmcache_rag_kernels import Rows
    from torch import Tensor

    from lmcache_rag.codec.residual import ResidualCodec
    from lmcache_rag.codec.transform import TransformCodec


class LoadedKV:
    """One stored variant of a chunk, decoded when it is wanted.

    Args:
        size_bytes: read for it.
        base: what a residual is added to; no residual itself.
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
            base = (cast("TransformCodec", self._base._codec), self._base._stored.coded)
            cast("ResidualCodec", self._codec).restore_onto(*base, self._stored.coded, offset, rows)

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
