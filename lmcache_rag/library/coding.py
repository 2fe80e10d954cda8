"""A chunk's KV as an object of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache_rag.chunk_kv import RESIDUAL, ChunkKV, KVScope, chunk_key
from lmcache_rag.codec import BaseObject, Codec, ObjectHeader, pack

if TYPE_CHECKING:
    from torch import Tensor


def coded(
    chunk: ChunkKV,
    scope: KVScope,
    variant: str,
    name: str,
    codec: Codec,
    tables: str,
    base: tuple[BaseObject, Tensor] | None = None,
) -> tuple[ObjectHeader, list[bytes | memoryview]]:
    """The object of a variant of a chunk: its header, and its parts, to be written one after another.

    Args:
        tables: digest of the codec's tables.
        base: of a residual, and its KV in float32, as it is read from the store.
    """
    layers, _, tokens, kv_heads, head_size = chunk.kv.shape
    header = ObjectHeader(
        namespace=scope.namespace,
        model=scope.model,
        key=chunk_key(chunk.token_ids),
        variant=variant,
        codec=name if base is None else RESIDUAL,
        base=None if base is None else base[0],
        tables=tables,
        tokens=tokens,
        group=codec.group,
        layers=layers,
        kv_heads=kv_heads,
        head_size=head_size,
        dtype=str(chunk.kv.dtype).removeprefix("torch."),
    )
    kv = chunk.kv if base is None else chunk.kv.float().cpu() - base[1]
    return header, pack(header, chunk.token_ids, codec.encode(kv))
