"""Which stored chunks occur in a prompt, found by their tokens.

The prompt's fingerprints are looked up among those of all chunks. What a rare one points to is a candidate: a chunk,
and how far it is shifted against the prompt. Of a common one, such as those of a header that many chunks share, a few
places are taken. Candidates with the most fingerprints come first, and each is verified token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lmcache_rag.records.fingerprints import SHORTEST, gram_hashes, winnow
from lmcache_rag.records.part import Part
from lmcache_rag.records.records import Records

_RARE = 8
"""A fingerprint of more places than these is common."""

_OF_COMMON = 4
"""So many places of a common one are looked at."""

MOST_CANDIDATES = 2048
MOST_COMPARED = 256
"""So many candidates are looked at for one prompt, and so many are compared with it."""


@dataclass(frozen=True)
class Match:
    """Tokens `start` to `start + length` of a prompt are tokens `offset` to `offset + length` of a stored chunk.

    Attributes:
        key: the chunk's.
        chunk: its tokens, int32.
    """

    start: int
    length: int
    offset: int
    key: bytes
    chunk: np.ndarray


@dataclass(frozen=True)
class Found:
    """What a prompt holds.

    Attributes:
        matches: ascending, not overlapping.
        cut_short: there were more candidates than are verified, and some may have been matches.
    """

    matches: list[Match]
    cut_short: bool


@dataclass(frozen=True)
class _Candidate:
    """A chunk whose token i may be token i + shift of the prompt: fingerprints agree at `places` of the prompt."""

    part: Part
    chunk: int
    shift: int
    places: np.ndarray


def find(records: Records, token_ids: Sequence[int] | np.ndarray, min_match: int = SHORTEST) -> Found:
    """Stored chunks, or parts of them, in a prompt: the longest first, then what is left beside it.

    Args:
        min_match: shortest run of tokens worth reusing, `SHORTEST` at least; every run is found that is so long.
    """
    prompt = np.asarray(token_ids, dtype=np.int32)
    hashes = gram_hashes(prompt)
    places = winnow(hashes)
    places = places[np.argsort(hashes[places], kind="stable")]
    candidates = [one for part in records.parts for one in _candidates(part, hashes[places], places)]
    candidates.sort(key=lambda candidate: -len(candidate.places))
    covered = np.zeros(len(prompt), bool)
    runs: list[Match] = []
    compared, cut_short = 0, len(candidates) > MOST_CANDIDATES
    for candidate in candidates[:MOST_CANDIDATES]:
        if covered[candidate.places].all():
            continue  # a run that were longer would have a fingerprint beside what is covered
        if compared == MOST_COMPARED:
            cut_short = True
            break
        compared += 1
        for run in _verified(candidate, prompt, min_match):
            if records.variants(run.key):
                runs.append(run)
                covered[run.start : run.start + run.length] = True
    return Found(_apart(runs, min_match), cut_short)


def _candidates(part: Part, wanted: np.ndarray, places: np.ndarray) -> list[_Candidate]:
    """What these fingerprints point to.

    Args:
        wanted: fingerprints, ascending, at `places` of the prompt.
    """
    if not len(part.gram):
        return []
    first = np.searchsorted(part.gram, wanted, side="left")
    known = np.flatnonzero(part.gram[np.minimum(first, len(part.gram) - 1)] == wanted)
    if not len(known):
        return []
    first, places = first[known], places[known]
    count = np.searchsorted(part.gram, wanted[known], side="right") - first
    count = np.where(count > _RARE, _OF_COMMON, count)
    ends = np.cumsum(count)
    rows = np.arange(ends[-1]) + np.repeat(first - (ends - count), count)
    chunk = part.gram_chunk[rows].astype(np.int64)
    places = np.repeat(places, count)
    # One number for chunk and shift, which lies between minus the longest chunk and the prompt's length.
    both = (chunk << 32) + (places - part.gram_at[rows] + (1 << 31))
    order = np.argsort(both, kind="stable")
    both, places = both[order], places[order]
    edges = [*np.flatnonzero(np.diff(both, prepend=-1)).tolist(), len(both)]
    return [
        _Candidate(part, one >> 32, (one & 0xFFFFFFFF) - (1 << 31), places[start:end])
        for one, (start, end) in zip(both[edges[:-1]].tolist(), pairwise(edges), strict=True)
        if one >> 32 < len(part)
    ]


def _verified(candidate: _Candidate, prompt: np.ndarray, min_match: int) -> Iterator[Match]:
    """The candidate's runs of equal tokens."""
    tokens, shift = candidate.part.tokens_of(candidate.chunk), candidate.shift
    start, end = max(0, shift), min(len(prompt), shift + len(tokens))
    if end - start < min_match:
        return
    differ = (prompt[start:end] != tokens[start - shift : end - shift]).nonzero()[0]
    edges = np.concatenate([[-1], differ, [end - start]])
    for number in np.flatnonzero(np.diff(edges) > min_match).tolist():
        at = start + int(edges[number]) + 1
        length = int(edges[number + 1] - edges[number]) - 1
        yield Match(at, length, at - shift, candidate.part.key(candidate.chunk), tokens)


def _apart(runs: list[Match], min_match: int) -> list[Match]:
    """The longest run, then the longest of what is left beside it, and so on; of equals the first, and of those one
    that begins its chunk."""
    waiting = sorted(runs, key=lambda run: (-run.length, run.start, run.offset))
    taken: list[Match] = []
    while waiting:
        best = waiting.pop(0)
        taken.append(best)
        cut = [piece for run in waiting for piece in _beside(run, best) if piece.length >= min_match]
        if len(cut) != len(waiting) or any(a is not b for a, b in zip(cut, waiting, strict=True)):
            cut.sort(key=lambda run: (-run.length, run.start, run.offset))
        waiting = cut
    return sorted(taken, key=lambda match: match.start)


def _beside(run: Match, taken: Match) -> list[Match]:
    """What is left of a run where another one was taken."""
    start, end = taken.start, taken.start + taken.length
    if run.start >= end or run.start + run.length <= start:
        return [run]
    before = start - run.start
    after = run.start + run.length - end
    pieces = []
    if before > 0:
        pieces.append(Match(run.start, before, run.offset, run.key, run.chunk))
    if after > 0:
        pieces.append(Match(end, after, run.offset + end - run.start, run.key, run.chunk))
    return pieces
