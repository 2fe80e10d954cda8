"""One chunk's position-free K and V, and how it is named in a store.

A chunk's identity is (namespace, model fingerprint, chunk tokens). A stored object is one *variant* of it: the KV
computed behind one particular context (preamble and primer), in one codec and format version. Names are content
addresses, so the same text in two documents is stored once and a rewritten chunk can never be mistaken for the old one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from lmcache_rag_kernels import Rows
    from torch import Tensor

NO_CONTEXT = "0" * 16
"""Variant of KV that was computed behind nothing: a preamble's own."""

RESIDUAL = "residual"
"""Stands for a codec in the name of what a variant differs by from another one; see `form_of`."""

TOGETHER = 1 << 19
"""So many values of K at most are computed at once, so that they stay in the processor's cache between operations."""


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

    def place(self, offset: int, rows: Rows) -> None:
        """Write tokens from `offset` on to as many rows."""
        place(self.kv[:, :, offset : offset + rows.length], rows)


def place(kv: Tensor, rows: Rows) -> None:
    """Write position-free K and V `[layers, 2, length, kv_heads, head_size]` to rows, K rotated to place."""
    import torch
    from lmcache_rag_kernels import rotate

    rows.value.copy_(kv[:, 1])
    key, length = rows.key, rows.length
    most = max(1, TOGETHER * length // key.numel()) if length else 1
    for begin in range(0, length, most):
        tokens = slice(begin, min(begin + most, length))
        positions = torch.arange(rows.start + tokens.start, rows.start + tokens.stop, device=key.device)
        layer = 0
        for _, alike in itertools.groupby(rows.rotations, key=id):
            rotation, *others = alike
            own = slice(layer, layer := layer + 1 + len(others))
            to, taken = key[own, tokens], kv[own, 0, tokens].to(key.device)
            if rotation is None:
                to.copy_(taken)
            else:
                rotate(taken, rotation, positions, out=to)


@dataclass(frozen=True)
class KVShape:
    """What one token's KV looks like in a model."""

    layers: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Of K and V in all layers, uncoded."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.dtype.itemsize


@dataclass(frozen=True)
class StoredForm:
    """A stored object of a chunk, in one codec.

    Attributes:
        used_s: when it was last used, or stored, in seconds since 1970.
    """

    name: str
    size_bytes: int
    used_s: int = 0


@dataclass(frozen=True)
class KVScope:
    """Within which KV may be shared: one namespace and one model."""

    namespace: str
    model: str

    @property
    def prefix(self) -> str:
        """Every object's name in this scope starts with it."""
        return f"{self.namespace}/{self.model}/"

    def folder(self, key: bytes) -> str:
        """What the names of all objects of one chunk start with."""
        digits = key.hex()
        return f"{self.prefix}{digits[:2]}/{digits}/"


def key_of(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """Content address of a chunk's tokens: 16 bytes."""
    return hashlib.blake2b(np.asarray(token_ids, dtype="<i4").tobytes(), digest_size=16).digest()


def chunk_key(token_ids: Sequence[int] | np.ndarray) -> str:
    """The same as 32 hex digits."""
    return key_of(token_ids).hex()


def variant_of(preamble: Sequence[int] | np.ndarray, primer: Sequence[int] | np.ndarray = ()) -> str:
    """Name of the variant computed behind the tokens of `preamble`, and of `primer` between it and the chunk.

    16 hex digits that begin the preamble's own key; where there is a primer, `-` and 16 of the primer's.
    """
    behind = context_digest(preamble) if len(preamble) else NO_CONTEXT
    return f"{behind}-{context_digest(primer)}" if len(primer) else behind


def form_of(variant: str, codec: str, base: str = "") -> str:
    """What a stored object of a variant is called: `variant.codec`, or `variant.residual.base` where it holds what the
    variant differs by from another form of the chunk, `base`, in whose codec it is then too."""
    return f"{variant}.{RESIDUAL}.{base}" if base else f"{variant}.{codec}"


def variant_in(form: str) -> str:
    """The variant that a form is one of."""
    return form.partition(".")[0]


def codec_in(form: str) -> str:
    """In which codec K and V are that are read from a form: of a residual, that of its base."""
    return (base_of(form) or form).partition(".")[2]


def base_of(form: str) -> str:
    """The form that a form is a residual against; empty where it is whole."""
    _, residual, base = form.partition(f".{RESIDUAL}.")
    return base if residual else ""


def context_digest(token_ids: Sequence[int] | np.ndarray) -> str:
    """What a preamble or a primer is called in a variant's name: 16 hex digits."""
    return key_of(token_ids).hex()[:16]


def preamble_of(variant: str) -> str:
    """The digest of the preamble that a variant was computed behind."""
    return variant.partition("-")[0]
