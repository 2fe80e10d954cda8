"""Which stored chunks occur in a prompt, found by their tokens.

The prompt's fingerprints are looked up among those of all chunks. What a rare one points to is a candidate: a chunk,
and how far it is shifted against the prompt. Of a common one, such as those of a header that many chunks share, a few
places are taken. Candidates with the most fingerprints come first, and each is verified token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

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
    places: list[int]


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
        columns, places = (self.both[wanted], self.starts[wanted], self.counts[wanted]), self.places.tolist()
        return [
            _Candidate(self.part, both >> 32, (both & 0xFFFFFFFF) - (1 << 31), places[start : start + count])
            for both, start, count in zip(*(column.tolist() for column in columns), strict=True)
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
    covered = bytearray(len(prompt))
    runs: list[Match] = []
    left = MOST_COMPARED
    several = [one for group in found for one in group.take(group.counts >= _SEVERAL)]
    left = _compare(several, prompt, min_match, records, covered, runs, left)
    few = [one for group in found for one in group.take(_promising(group, np.frombuffer(covered, bool), prompt))]
    left = _compare(few, prompt, min_match, records, covered, runs, left)
    return Found(_apart(runs, min_match), cut_short=left < 0)


def _promising(group: _Candidates, covered: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Which candidates with few fingerprints have one that is not where runs were found, since a run of theirs that
    were longer would have another one beside those, and is in a run of `SHORTEST` equal tokens: bool."""
    part = group.part
    candidate = np.repeat(np.arange(len(group.starts)), group.counts)
    chosen = np.flatnonzero((group.counts < _SEVERAL)[candidate] & ~covered[group.places])
    candidate, places = candidate[chosen], group.places[chosen]
    chunk = group.both[candidate] >> 32
    first, last = (np.minimum(part.token_at[at], len(part.tokens)).astype(np.int64) for at in (chunk, chunk + 1))
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
    covered: bytearray,
    runs: list[Match],
    left: int,
) -> int:
    """Add the candidates' runs to `runs`, and to what is covered.

    Args:
        left: how many may be compared; what is left of that is returned, -1 where it was too few.
    """
    for candidate in sorted(candidates, key=lambda one: -len(one.places)):
        if all(covered[place] for place in candidate.places):
            continue
        if left <= 0:
            return -1
        left -= 1
        for run in _verified(candidate, prompt, min_match, records):
            runs.append(run)
            covered[run.start : run.end] = b"\1" * run.length
    return left


def _candidates(part: Part, wanted: np.ndarray, places: np.ndarray) -> _Candidates | None:
    """What these fingerprints point to, if to anything.

    Args:
        wanted: fingerprints, ascending, at `places` of the prompt.
    """
    if not len(part.gram):
        return None
    first = _first_places(part.gram, wanted)
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
    chunk = np.minimum(part.gram_chunk[rows], len(part) - 1)  # of a damaged part it may be any number
    # One number for chunk and shift, which lies between minus the longest chunk and the prompt's length.
    both = (chunk.astype(np.int64) << 32) + (places - part.gram_at[rows] + (1 << 31))
    order = np.argsort(both, kind="stable")
    both, places = both[order], places[order]
    starts = np.flatnonzero(np.diff(both, prepend=-1))
    return _Candidates(part, both[starts], places, starts, np.diff(starts, append=len(both)))


def _first_places(grams: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """What `np.searchsorted` says. A step of the search is made for all that are wanted before the next one, so that
    they wait for memory together: with millions of fingerprints that takes less than half the time."""
    first = np.zeros(len(wanted), np.int64)
    left = len(grams)
    while left > 1:
        half = left // 2
        first += half * (grams[first + (half - 1)] < wanted)
        left -= half
    return first + (grams[first] < wanted)


def _verified(candidate: _Candidate, prompt: np.ndarray, min_match: int, records: Records) -> Iterator[Match]:
    """The runs of equal tokens at the candidate's shift, where its chunk is stored still."""
    tokens, shift = candidate.part.tokens_of(candidate.chunk), candidate.shift
    start, end = max(0, shift), min(len(prompt), shift + len(tokens))
    if end - start < min_match:
        return
    differ = (prompt[start:end] != tokens[start - shift : end - shift]).tobytes()
    runs = [(at, length) for at, length in _gaps(differ, 0, len(differ)) if length >= min_match]
    if not runs:
        return
    key = candidate.part.key(candidate.chunk)
    stored = records.variants(key)
    if stored:
        for at, length in runs:
            yield Match(start + at, length, start + at - shift, key, tokens, stored)


def _apart(runs: list[Match], min_match: int) -> list[Match]:
    """The longest run, then the longest of what is left beside it, and so on; of equals the first, and of those one
    that begins its chunk."""
    taken: list[Match] = []
    is_taken = bytearray(max((run.end for run in runs), default=0))
    waiting = [(-run.length, run.start, run.offset, number, run) for number, run in enumerate(runs)]
    heapify(waiting)
    while waiting:
        *_, number, run = heappop(waiting)
        beside = list(_gaps(is_taken, run.start, run.end))
        if beside == [(run.start, run.length)]:
            taken.append(run)
            is_taken[run.start : run.end] = b"\1" * run.length
            continue
        for start, length in beside:
            if length >= min_match:
                piece = replace(run, start=start, length=length, offset=run.offset + start - run.start)
                heappush(waiting, (-length, start, piece.offset, number, piece))
    return sorted(taken, key=lambda match: match.start)


def _gaps(flags: bytes | bytearray, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Starts and lengths of the runs of 0 from `start` to `end`; all else is 1."""
    while (start := flags.find(0, start, end)) >= 0:
        stop = flags.find(1, start, end)
        stop = end if stop < 0 else stop
        yield start, stop - start
        start = stop
