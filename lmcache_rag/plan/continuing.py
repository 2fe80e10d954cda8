"""Where a chunk goes on beside a run of it that was found in a prompt.

Text that was escaped, quoted or indented on its way into the prompt has other tokens than the chunk at each line's end
or quotation mark, and what lies between is often too short to be found by itself. Beside a run that was found it need
not be: a few equal tokens tell where the chunk goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lmcache_rag.records.catalog import Match

_SKIPPED = 16
"""So many tokens of prompt and chunk at most are others between two runs."""

_AGREEING = 4
"""So many equal tokens tell that the chunk goes on there."""

_SHORTEST_PIECE = 8
"""A shorter run is not worth placing by itself."""


def continued(prompt: np.ndarray, matches: Sequence[Match]) -> list[Match]:
    """The matches, and the runs of their chunks before, between and behind them; ascending, not overlapping."""
    every: list[Match] = []
    text: list[int] = []
    for number, match in enumerate(matches):
        end = matches[number + 1].start if number + 1 < len(matches) else len(prompt)
        start = every[-1].end if every else 0
        if _is_whole(match) or end - start == match.length:
            every.append(match)
            continue
        text = text or prompt.tolist()
        chunk = match.chunk.tolist()
        before = _pieces(text[start : match.start][::-1], chunk[: match.offset][::-1])
        every += [
            replace(match, start=match.start - at - length, offset=match.offset - own - length, length=length)
            for at, own, length in reversed(list(before))
        ]
        every.append(match)
        behind = _pieces(text[match.end : end], chunk[match.offset + match.length :])
        every += [
            replace(match, start=match.end + at, offset=match.offset + match.length + own, length=length)
            for at, own, length in behind
        ]
    return every


def _is_whole(match: Match) -> bool:
    return match.length == len(match.chunk)


def _pieces(text: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of a chunk in a text, in order, each a few tokens behind the one before: where each starts in both, and its
    length."""
    at, own = 0, 0
    while (step := _next_run(text, chunk, at, own)) is not None:
        at, own = at + step[0], own + step[1]
        length = _common(text, chunk, at, own)
        if length >= _SHORTEST_PIECE:
            yield at, own, length
        at, own = at + length, own + length


def _next_run(text: Sequence[int], chunk: Sequence[int], at: int, own: int) -> tuple[int, int] | None:
    """How many tokens of both to skip, as few as possible, until they agree."""
    ahead = {_gram(chunk, own + passed): passed for passed in reversed(range(_SKIPPED + 1))}
    steps = [(skipped, ahead[gram]) for skipped in range(_SKIPPED + 1) if (gram := _gram(text, at + skipped)) in ahead]
    return min((step for step in steps if at + step[0] + _AGREEING <= len(text)), key=sum, default=None)


def _gram(token_ids: Sequence[int], at: int) -> tuple[int, ...]:
    return tuple(token_ids[at : at + _AGREEING])


def _common(text: Sequence[int], chunk: Sequence[int], at: int, own: int) -> int:
    length = 0
    while at + length < len(text) and own + length < len(chunk) and text[at + length] == chunk[own + length]:
        length += 1
    return length
