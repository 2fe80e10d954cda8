"""One chunk's position-free K and V, and how it is named in a store.

A chunk's identity is (namespace, model fingerprint, chunk tokens). A stored object is one *variant* of it: the KV
computed behind one particular context (the preamble), in one codec and format version. Names are content addresses, so
the same text in two documents is stored once and a rewritten chunk can never be mistaken for the old one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

NO_CONTEXT = "0" * 16
"""Variant of KV that was computed behind nothing: a preamble's own."""


@dataclass(frozen=True)
class ChunkKV:
    """K and V of one chunk, RoPE taken off K.

    Attributes:
        token_ids: the chunk's tokens, int32 `[tokens]`.
        kv: `[layers, 2, tokens, kv_heads, head_size]` in the model's dtype; index 0 of the second axis is K, 1 is V.
    """

    token_ids: np.ndarray
    kv: Tensor

    @property
    def tokens(self) -> int:
        return int(self.kv.shape[2])


@dataclass(frozen=True)
class KVScope:
    """Within which KV may be shared: one namespace and one model."""

    namespace: str
    model: str

    @property
    def prefix(self) -> str:
        """Every object's name in this scope starts with it."""
        return f"{self.namespace}/{self.model}/"

    def chunk_prefix(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """What the names of all variants of one chunk start with."""
        key = chunk_key(token_ids)
        return f"{self.prefix}{key[:2]}/{key}/"


def chunk_key(token_ids: Sequence[int] | np.ndarray) -> str:
    """Content address of a chunk's tokens: 32 hex digits."""
    return _digest(token_ids, 16)


def variant_of(context_ids: Sequence[int] | np.ndarray) -> str:
    """Name of the variant computed behind the tokens `context_ids`: 16 hex digits."""
    return _digest(context_ids, 8) if len(context_ids) else NO_CONTEXT


def _digest(token_ids: Sequence[int] | np.ndarray, size: int) -> str:
    return hashlib.blake2b(np.asarray(token_ids, dtype="<i4").tobytes(), digest_size=size).hexdigest()
