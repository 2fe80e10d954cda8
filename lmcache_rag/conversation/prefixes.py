"""Exact prefixes in the store: the beginning of a conversation, from which any engine goes on.

A prefix is kept in pieces of `PIECE_TOKENS` tokens, each stored like a chunk, lossless, as the variant that was
computed behind all tokens before it. So its name says what it is exact behind, a longer conversation adds pieces to
those of the shorter one, and prompts that begin alike share them. Conversations have a namespace of their own beside
that of the chunks, one for each cache salt, so that no prompt of others is matched with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lmcache_rag.chunk_kv import StoredForm, key_of
from lmcache_rag.codec import CODECS
from lmcache_rag.library.chains import Behind
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.names import codec_of
from lmcache_rag.plan.plan import PlannedSegment

PIECE_TOKENS = 64
"""A group of the codecs: what a turn adds is kept but for so many tokens at most."""


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `start + PIECE_TOKENS` of a prompt.

    Attributes:
        variant: the one that was computed behind all tokens before.
    """

    start: int
    token_ids: np.ndarray
    variant: str


def stored_pieces(chunks: ChunkStore, token_ids: Sequence[int] | np.ndarray) -> list[tuple[Piece, StoredForm]]:
    """The pieces that a prompt begins with, as far as all of them are recorded in a namespace of conversations."""
    found = []
    for piece in pieces(token_ids):
        form = chunks.variants(key_of(piece.token_ids)).get(piece.variant)
        if form is None or not CODECS[codec_of(form.name)].lossless:
            break
        found.append((piece, form))
    return found


def begun_segments(chunks: ChunkStore, token_ids: Sequence[int] | np.ndarray) -> tuple[PlannedSegment, ...]:
    """The same, as what a plan loads."""
    return tuple(
        PlannedSegment(piece.start, PIECE_TOKENS, name=form.name, exact=True, size_bytes=form.size_bytes)
        for piece, form in stored_pieces(chunks, token_ids)
    )


def pieces(token_ids: Sequence[int] | np.ndarray) -> Iterator[Piece]:
    """The whole pieces of a prompt, in order."""
    tokens = np.asarray(token_ids, dtype="<i4")
    behind = Behind()
    for start in range(0, len(tokens) - PIECE_TOKENS + 1, PIECE_TOKENS):
        piece = tokens[start : start + PIECE_TOKENS]
        yield Piece(start, piece, behind.variant)
        behind = behind.then(piece)
