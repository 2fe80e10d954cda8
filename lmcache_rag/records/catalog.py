"""Which stored chunks occur in a prompt, found by their tokens.

The prompt's fingerprints are looked up among those of all chunks. What a rare one points to is a candidate: a chunk,
and how far it is shifted against the prompt. Of a common one, such as those of a header that many chunks share, a few
places are taken. Candidates with the most fingerprints come first, and each is verified token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmcache_rag.prompt import Segment
from lmcache_rag.records.fingerprints import GRAM, SHORTEST, gram_hashes, winnow
from lmcache_rag.records.part import Part, VariantRow
from lmcache_rag.records.records import Records

_RARE = 8
"""A fingerprint of more places than these is common."""

_OF_COMMON = 4
"""So many places of a common one are looked at."""

_SEVERAL = 3
"""A candidate with so many fingerprints is looked at before those with fewer."""

MOST_COMPARED = 256
"""So many candidates are compared with one prompt."""


@dataclass(frozen=True)
class Match(Segment):
    """A place in a prompt whose tokens are tokens `offset` to `offset + length` of a stored chunk.

    Attributes:
        key: the chunk's.
        chunk: its tokens, int32.
        stored: its stored objects, by form.
    """

    offset: int
    key: bytes
    chunk: np.ndarray
    stored: Mapping[str, VariantRow]


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


@dataclass(frozen=True)
class _Candidates:
    """Those of one part.

    Attributes:
        both: int64, chunk times 2^32, plus shift plus 2^31.
        places: of all of them, one candidate's behind the other's.
        starts, counts: where each one's begin, and how many they are.
    """

    part: Part
    both: np.ndarray
    places: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    def take(self, wanted: np.ndarray) -> list[_Candidate]:
        """Those that are wanted (bool)."""
        columns = (self.both[wanted], self.starts[wanted], self.counts[wanted])
        return [
            _Candidate(self.part, both >> 32, (both & 0xFFFFFFFF) - (1 << 31), self.places[start : start + count])
            for both, start, count in zip(*(column.tolist() for column in columns), strict=True)
            if both >> 32 < len(self.part)
        ]


def find(records: Records, token_ids: Sequence[int] | np.ndarray, min_match: int = SHORTEST) -> Found:
    """Stored chunks, or parts of them, in a prompt: the longest first, then what is left beside it.

    Args:
        min_match: shortest run of tokens worth reusing, `SHORTEST` at least; every run is found that is so long.
    """
    prompt = np.asarray(token_ids, dtype=np.int32)
    hashes = gram_hashes(prompt)
    places = winnow(hashes)
    places = places[np.argsort(hashes[places], kind="stable")]
    found = [group for part in records.parts if (group := _candidates(part, hashes[places], places)) is not None]
    covered = np.zeros(len(prompt), bool)
    runs: list[Match] = []
    left = MOST_COMPARED
    several = [one for group in found for one in group.take(group.counts >= _SEVERAL)]
    left = _compare(several, prompt, min_match, records, covered, runs, left)
    few = [one for group in found for one in group.take(_promising(group, covered, prompt))]
    left = _compare(few, prompt, min_match, records, covered, runs, left)
    return Found(_apart(runs, min_match), cut_short=left < 0)


def _promising(group: _Candidates, covered: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Which candidates with few fingerprints have one that is not where runs were found, since a run of theirs that
    were longer would have another one beside those, and is in a run of `SHORTEST` equal tokens: bool."""
    part = group.part
    candidate = np.repeat(np.arange(len(group.starts)), group.counts)
    chosen = np.flatnonzero((group.counts < _SEVERAL)[candidate] & ~covered[group.places])
    candidate, places = candidate[chosen], group.places[chosen]
    chunk = np.minimum(group.both[candidate] >> 32, len(part) - 1)
    first, last = part.token_at[chunk].astype(np.int64), part.token_at[chunk + 1].astype(np.int64)
    start = first + places - ((group.both[candidate] & 0xFFFFFFFF) - (1 << 31))
    around = np.arange(GRAM - SHORTEST, SHORTEST)
    here, there = places[:, None] + around, start[:, None] + around
    inside = (here >= 0) & (here < len(prompt)) & (there >= first[:, None]) & (there < last[:, None])
    here, there = np.where(inside, here, 0), np.where(inside, there, 0)
    equal = inside & (prompt[here] == part.tokens[there])
    before, behind = equal[:, SHORTEST - GRAM - 1 :: -1], equal[:, SHORTEST - GRAM :]
    run = sum(np.logical_and.accumulate(side, axis=1).sum(1) for side in (before, behind))
    promising = np.zeros(len(group.starts), bool)
    promising[candidate[run >= SHORTEST]] = True
    return promising


def _compare(
    candidates: list[_Candidate],
    prompt: np.ndarray,
    min_match: int,
    records: Records,
    covered: np.ndarray,
    runs: list[Match],
    left: int,
) -> int:
    """Add the candidates' runs to `runs`, and to what is covered.

    Args:
        left: how many may be compared; what is left of that is returned, -1 where it was too few.
    """
    for candidate in sorted(candidates, key=lambda one: -len(one.places)):
        if covered[candidate.places].all():
            continue
        if left <= 0:
            return -1
        left -= 1
        for run in _verified(candidate, prompt, min_match, records):
            runs.append(run)
            covered[run.start : run.end] = True
    return left


def _candidates(part: Part, wanted: np.ndarray, places: np.ndarray) -> _Candidates | None:
    """What these fingerprints point to, if to anything.

    Args:
        wanted: fingerprints, ascending, at `places` of the prompt.
    """
    if not len(part.gram):
        return None
    first = np.searchsorted(part.gram, wanted, side="left")
    known = np.flatnonzero(part.gram[np.minimum(first, len(part.gram) - 1)] == wanted)
    if not len(known):
        return None
    first, places = first[known], places[known]
    beside = np.minimum(first[:, None] + np.arange(_RARE + 1), len(part.gram) - 1)
    count = np.minimum((part.gram[beside] == wanted[known, None]).sum(1), len(part.gram) - first)
    count = np.where(count > _RARE, _OF_COMMON, count)
    ends = np.cumsum(count)
    rows = np.arange(ends[-1]) + np.repeat(first - (ends - count), count)
    places = np.repeat(places, count)
    # One number for chunk and shift, which lies between minus the longest chunk and the prompt's length.
    both = (part.gram_chunk[rows].astype(np.int64) << 32) + (places - part.gram_at[rows] + (1 << 31))
    order = np.argsort(both, kind="stable")
    both, places = both[order], places[order]
    starts = np.flatnonzero(np.diff(both, prepend=-1))
    return _Candidates(part, both[starts], places, starts, np.diff(starts, append=len(both)))


def _verified(candidate: _Candidate, prompt: np.ndarray, min_match: int, records: Records) -> Iterator[Match]:
    """The runs of equal tokens around the candidate's fingerprints, where its chunk is stored still."""
    tokens, shift = candidate.part.tokens_of(candidate.chunk), candidate.shift
    start, end = max(0, shift), min(len(prompt), shift + len(tokens))
    if end - start < min_match:
        return
    differ = (prompt[start:end] != tokens[start - shift : end - shift]).nonzero()[0]
    edges = np.concatenate(([-1], differ, [end - start]))
    behind = edges.searchsorted(candidate.places - start)
    key, stored = b"", None
    for number in dict.fromkeys(behind.tolist()):
        at, length = start + int(edges[number - 1]) + 1, int(edges[number] - edges[number - 1]) - 1
        if length < min_match:
            continue
        if stored is None:
            key = candidate.part.key(candidate.chunk)
            stored = records.variants(key)
        if stored:
            yield Match(at, length, at - shift, key, tokens, stored)


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
    start, end = taken.start, taken.end
    if run.start >= end or run.end <= start:
        return [run]
    before = start - run.start
    after = run.end - end
    pieces = []
    if before > 0:
        pieces.append(replace(run, length=before))
    if after > 0:
        pieces.append(replace(run, start=end, length=after, offset=run.offset + end - run.start))
    return pieces
