"""Text that recurs: runs of tokens that a prompt shares with an earlier one, wherever they lie in both."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmcache_rag.records.fingerprints import SHORTEST, gram_hashes, winnow

SHORTEST_RUN = 64
"""A shorter run is not worth an object in the store."""

_REMEMBERED_TOKENS = 1 << 19
_REMEMBERED_PROMPTS = 2048
"""Of all callers together; what was asked longest ago is forgotten."""

_MOST_COMPARED = 32
"""So many pairs of an earlier prompt and a shift are compared with a prompt, those with most fingerprints first."""

_MOST_PREAMBLE = 512
"""A preamble is kept lossless: of a longer one, what comes behind these tokens counts as a primer."""


@dataclass(frozen=True)
class Recurring:
    """What of a prompt was in earlier ones.

    Attributes:
        runs: start and length of each, ascending and not overlapping. The beginning that the prompt has in common with
            an earlier one is none of them: the prefix cache has that.
        preamble: so many of the prompt's first tokens begin all earlier prompts that share a run with it.
    """

    runs: tuple[tuple[int, int], ...] = ()
    preamble: int = 0


@dataclass(frozen=True)
class _Prompt:
    """A prompt that is remembered: its tokens (int32), its caller, and its fingerprints, mixed with the caller."""

    token_ids: np.ndarray
    caller: str
    fingerprints: Sequence[int]


class RecentPrompts:
    """The prompts asked last, and the fingerprints by which what they share with a new one is found. Those of one
    caller are never compared with another's. In memory only.

    Args:
        most_tokens, most_prompts: so many are remembered, of all callers together.
    """

    def __init__(self, most_tokens: int = _REMEMBERED_TOKENS, most_prompts: int = _REMEMBERED_PROMPTS) -> None:
        self._most_tokens = most_tokens
        self._most_prompts = most_prompts
        self._prompts: OrderedDict[int, _Prompt] = OrderedDict()
        self._tokens = 0
        self._places: dict[int, int] = {}  # of a fingerprint: the last prompt that has it times 2^32, plus where
        self._next = 0

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def fingerprints(self) -> int:
        """How many are remembered."""
        return len(self._places)

    def add(self, token_ids: Sequence[int] | np.ndarray, caller: str) -> Recurring:
        """Remember a prompt, and say what of it recurs.

        Args:
            caller: whose prompt it is.
        """
        tokens = np.array(token_ids, dtype=np.int32)
        if not SHORTEST <= len(tokens) <= self._most_tokens:
            return Recurring()
        hashes = gram_hashes(tokens)
        places = winnow(hashes)
        prompt = _Prompt(tokens, caller, (hashes[places] ^ _hash_of(caller)).tolist())
        recurring = self._recurring(prompt, places)
        self._keep(prompt, places)
        return recurring

    def _recurring(self, prompt: _Prompt, places: np.ndarray) -> Recurring:
        found: list[tuple[int, int]] = []
        begun = _MOST_PREAMBLE
        for number, shift in self._shared(prompt, places):
            earlier = self._prompts[number]
            if earlier.caller != prompt.caller:
                continue  # one hash of two texts
            runs = [run for run in _equal_runs(prompt.token_ids, earlier.token_ids, shift) if shift or run[0]]
            if runs:
                found += runs
                begun = min(begun, _common(prompt.token_ids[:begun], earlier.token_ids[:begun]))
        apart = _apart(found, len(prompt.token_ids))
        return Recurring(apart, min(begun, apart[0][0])) if apart else Recurring()

    def _shared(self, prompt: _Prompt, places: np.ndarray) -> list[tuple[int, int]]:
        """Earlier prompts, and how far they are shifted against this one where they share fingerprints."""
        known = np.array([self._places.get(fingerprint, -1) for fingerprint in prompt.fingerprints], np.int64)
        there = known >= 0
        number, shift = known[there] >> 32, places[there] - (known[there] & 0xFFFFFFFF)
        pairs, counts = np.unique((number << 32) + shift + (1 << 31), return_counts=True)
        pairs = pairs[np.argsort(-counts, kind="stable")[:_MOST_COMPARED]]
        return list(zip((pairs >> 32).tolist(), ((pairs & 0xFFFFFFFF) - (1 << 31)).tolist(), strict=True))

    def _keep(self, prompt: _Prompt, places: np.ndarray) -> None:
        number, self._next = self._next, self._next + 1
        self._prompts[number] = prompt
        self._tokens += len(prompt.token_ids)
        self._places.update(zip(prompt.fingerprints, ((number << 32) + places).tolist(), strict=True))
        while self._tokens > self._most_tokens or len(self._prompts) > self._most_prompts:
            oldest, forgotten = self._prompts.popitem(last=False)
            self._tokens -= len(forgotten.token_ids)
            for fingerprint in set(forgotten.fingerprints):
                if self._places[fingerprint] >> 32 == oldest:
                    del self._places[fingerprint]


def free_runs(runs: Sequence[tuple[int, int]], taken: np.ndarray) -> tuple[tuple[int, int], ...]:
    """What of some runs is not taken (bool, by position), where that is long enough. Runs that touch stay apart: they
    were found in different places."""
    return tuple(
        (start + at, length)
        for start, whole in runs
        for at, length in _runs_of(~taken[start : start + whole])
        if length >= SHORTEST_RUN
    )


def _equal_runs(prompt: np.ndarray, earlier: np.ndarray, shift: int) -> list[tuple[int, int]]:
    """Start and length in the prompt of the runs that are equal to the earlier one's tokens `shift` before."""
    start, end = max(0, shift), min(len(prompt), len(earlier) + shift)
    equal = prompt[start:end] == earlier[start - shift : end - shift]
    return [(start + at, length) for at, length in _runs_of(equal) if length >= SHORTEST_RUN]


def _runs_of(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and length of the runs of True."""
    padded = np.zeros(len(flags) + 2, bool)
    padded[1:-1] = flags
    edges = (padded[1:] != padded[:-1]).nonzero()[0].tolist()
    return [(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _apart(runs: Sequence[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    """The longest run, then what is left of the next one beside it, and so on; ascending."""
    taken = np.zeros(length, bool)
    apart: list[tuple[int, int]] = []
    for run in sorted(set(runs), key=lambda run: (-run[1], run[0])):
        for start, left in free_runs([run], taken):
            apart.append((start, left))
            taken[start : start + left] = True
    return tuple(sorted(apart))


def _hash_of(caller: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(caller.encode(), digest_size=8).digest()))


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two runs have in common from the start."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
