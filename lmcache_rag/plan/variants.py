"""Which of a chunk's variants to reuse, by what they were computed behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmcache_rag.chunk_kv import StoredForm, preamble_of, variant_of
from lmcache_rag.plan.sources import Sources

MERGED = 4
"""Where a prompt is tokenised as one text, so many of a preamble's last tokens may have merged with what follows."""


@dataclass(frozen=True)
class Context:
    """What chunks are computed behind.

    Attributes:
        preamble, primer: token ids.
        merged: how many of the preamble's last tokens are others in the prompt.
    """

    preamble: Sequence[int] | np.ndarray
    primer: Sequence[int] | np.ndarray = ()
    merged: int = 0

    @property
    def variant(self) -> str:
        """The variant that is computed behind just this."""
        return variant_of(self.preamble, self.primer)

    def is_before(self, variant: str) -> bool:
        """Whether a variant was computed behind this preamble, with whatever primer."""
        return preamble_of(variant) == preamble_of(self.variant)


def context_of(
    before: np.ndarray, forms: Mapping[bytes, Mapping[str, StoredForm]], chunks: Sources
) -> tuple[Context, int]:
    """What the chunks of a prompt were computed behind, and how many of the prompt's first tokens are just that.

    It is `before`, the prompt's tokens before its first chunk, where they know a variant behind it; or else the longest
    preamble of theirs that `before` begins with, but for a few tokens at its end that merged with what follows: the
    first chunk, or what was said before it.

    Args:
        forms: the variants of each chunk, by its key.
    """
    own = Context(before)
    known = {preamble_of(variant): None for variants in forms.values() for variant in variants}
    if preamble_of(own.variant) in known:
        return own, len(before)
    best, agreed = own, 0
    for digest in known:
        preamble = chunks.preamble_named(digest)
        if preamble is None:
            continue
        common = _common(before, preamble)
        if common > agreed and len(preamble) - common <= MERGED:
            best, agreed = Context(preamble, merged=min(MERGED, max(len(preamble), len(before)) - common)), common
    return best, agreed or len(before)


def suited(forms: Mapping[str, StoredForm], context: Context, *, first: bool, primer: str | None) -> str | None:
    """The variant to reuse: in the first place one behind a preamble alone, which is exact there or next to it,
    elsewhere one behind a primer, which needs less repair; rather behind this preamble than behind another.

    Args:
        first: whether the chunk follows the preamble.
        primer: digest of the primer that the caller's own chunks are behind. Of several others the one last used.
    """

    def rank(variant: str) -> tuple[bool, bool, bool, int]:
        primed = "-" in variant
        return context.is_before(variant), primed != first, variant.endswith(f"-{primer}"), forms[variant].used_s

    return max(forms, key=rank, default=None)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens two sequences share."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
