"""Where a prompt says what is stored: chunks of its namespace, and what was said before in its conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmcache_rag.chunk_kv import key_of
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.plan.continuing import continued
from lmcache_rag.plan.plan import PlannedSegment
from lmcache_rag.records.catalog import Found, Match, find
from lmcache_rag.records.fingerprints import SHORTEST
from lmcache_rag.request import ReuseReport

NO_TOKEN = -1
"""Stands for what is not to be matched."""

_MERGED = 4
"""Tokens at a chunk's ends that may be others in a prompt, where the whole is tokenised as one text."""


@dataclass(frozen=True)
class History:
    """What is stored of a conversation beside the chunks of its namespace.

    Attributes:
        chunks: what was said and read in it.
        begun: exact KV of the prompt's beginning, from position 0 on without gaps.
    """

    chunks: ChunkStore
    begun: tuple[PlannedSegment, ...] = ()

    @property
    def end(self) -> int:
        """So many of the prompt's first tokens have stored exact KV."""
        return self.begun[-1].end if self.begun else 0


@dataclass(frozen=True)
class Matcher:
    """Finds stored chunks in prompts.

    Attributes:
        min_tokens: the shortest run of a stored chunk's tokens that is reused where it is found automatically.
        unit_tokens: a part of a chunk is reused from a multiple of so many of its tokens to another one, besides its
            ends. With a unit of 1, a client who knows a part of a chunk finds out the rest by trying one token after
            another, since the report, `cached_tokens` and the time that an answer takes tell how far it was right.
    """

    min_tokens: int = SHORTEST
    unit_tokens: int = 1

    def matches(
        self,
        prompt: np.ndarray,
        marked: Sequence[tuple[int, int]] | None,
        chunks: ChunkStore,
        report: ReuseReport,
    ) -> list[Match]:
        """The chunks of a prompt, ascending and not overlapping.

        Args:
            marked: start and length of each, where the prompt says so; else they are found by their tokens.
        """
        if marked is not None:
            tokens = [prompt[start : start + length] for start, length in marked]
            keys = [key_of(ids) for ids in tokens]
            return [
                Match(start, length, 0, key, ids, chunks.records.variants(key))
                for (start, length), key, ids in zip(marked, keys, tokens, strict=True)
            ]
        found = self.find(prompt, chunks)
        # It too would tell how far a guess was right.
        report.matching_cut_short = found.cut_short and self.unit_tokens == 1
        return found.matches

    def find(self, prompt: np.ndarray, chunks: ChunkStore) -> Found:
        """The chunks, or parts of them, that a prompt holds."""
        found = find(chunks.records, prompt, self.min_tokens)
        if self.unit_tokens == 1:
            return replace(found, matches=continued(prompt, found.matches))
        trimmed = (self._in_units(match) for match in found.matches)
        return replace(found, matches=[match for match in trimmed if match.length >= self.min_tokens])

    def _in_units(self, match: Match) -> Match:
        """The match from one unit's beginning to another's end. The chunk's first and last tokens may have merged with
        what stands beside them, so that a match may begin and end a little inside too: those few count as a unit."""
        unit, length = self.unit_tokens, len(match.chunk)
        begins = {0, min(_MERGED, length), *range(unit, length, unit)}
        ends = {length, max(0, length - _MERGED), *range(unit, length - unit + 1, unit)}
        start = min((at for at in begins if at >= match.offset), default=length)
        end = max((at for at in ends if at <= match.offset + match.length), default=0)
        at = match.start + start - match.offset
        return replace(match, start=at, offset=start, length=max(0, end - start))
