"""Fingerprints of token sequences, by which shared runs are found wherever they lie.

Robust winnowing (Schleimer, Wilkerson and Aiken 2003, "Winnowing: local algorithms for document fingerprinting"): of
the hashes of all runs of `GRAM` tokens, the smallest in each window of `WINDOW` is kept, and of equal ones no more than
it takes. Two texts that share `SHORTEST` tokens share a fingerprint.
"""

from __future__ import annotations

import numpy as np

GRAM = 16
WINDOW = 17
SHORTEST = GRAM + WINDOW - 1
"""The shortest run of tokens that is always found."""

_FACTORS = [np.uint64(pow(0x9E3779B97F4A7C15, span, 1 << 64)) for span in (1, 2, 4, 8)]
"""Of the hash of a run's first half, by the half's length."""


def gram_hashes(token_ids: np.ndarray) -> np.ndarray:
    """uint64 hash of each run of `GRAM` tokens."""
    count = len(token_ids) - GRAM + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    values = token_ids.astype(np.uint64) + np.uint64(1)
    # Runs of 2, 4, 8 and 16 tokens in turn, each from two of half its length.
    hashes = values
    for number, factor in enumerate(_FACTORS):
        span = 1 << number
        hashes = hashes[:-span] * factor + hashes[span:]
    return hashes ^ (hashes >> np.uint64(29))


def winnow(hashes: np.ndarray) -> np.ndarray:
    """Positions (int64, ascending) of the hashes to keep; none where there are fewer than `WINDOW`."""
    windows = len(hashes) - WINDOW + 1
    if windows < 1:
        return np.zeros(0, dtype=np.int64)
    # Hash and place in one number, by which the smallest hash of a window comes first, and of equal ones the last. The
    # lowest bits of a hash, which the place takes, decide nothing: hashes that differ in these alone are equal here.
    mask = np.uint64((1 << len(hashes).bit_length()) - 1)
    smallest = (hashes & ~mask) | (mask - np.arange(len(hashes), dtype=np.uint64))
    span = 1
    while span < WINDOW:
        step = min(span, WINDOW - span)
        smallest = np.minimum(smallest[step:], smallest[:-step])
        span += step
    smallest = smallest[np.flatnonzero(np.diff(smallest, prepend=~smallest[0]))]
    kept = (mask - (smallest & mask)).astype(np.int64)
    tied = np.flatnonzero(hashes[kept[1:]] == hashes[kept[:-1]])
    return _thinned(hashes, kept) if len(tied) else kept


def _thinned(hashes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Of neighbours with the same hash, the fewest of which every window has one: the text repeats itself there."""
    chosen = [int(kept[0])]
    values = hashes[kept].tolist()
    positions = kept.tolist()
    number = 1
    while number < len(positions):
        furthest = number
        if values[number] == values[number - 1]:
            while (
                furthest + 1 < len(positions)
                and values[furthest + 1] == values[number]
                and positions[furthest + 1] - chosen[-1] <= WINDOW
            ):
                furthest += 1
        chosen.append(positions[furthest])
        number = furthest + 1
    return np.array(chosen, dtype=np.int64)
