"""Scores of answers and of next-token distributions."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD's scorer takes them (Rajpurkar et al. 2016)."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def token_f1(found: str, gold: str) -> float:
    """F1 of the words two answers share."""
    found_words, gold_words = words_of(found), words_of(gold)
    shared = (Counter(found_words) & Counter(gold_words)).total()
    return _f1(shared, len(found_words), len(gold_words))


def rouge_l(found: str, reference: str) -> float:
    """ROUGE-L, the F1 of the longest common subsequence of words (Lin 2004)."""
    first, second = words_of(found), words_of(reference)
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            longer = diagonal + 1 if word == other else max(lengths[index - 1], lengths[index])
            diagonal, lengths[index] = lengths[index], longer
    return _f1(lengths[-1], len(first), len(second))


def kl_divergence(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(reference || found) of each row's distribution, from log-probabilities `[rows, vocabulary]`, in nats."""
    return np.sum(np.exp(reference) * (reference - found), axis=1)


def log_probs(rows: Sequence[dict[int, float]]) -> np.ndarray:
    """`[tokens, vocabulary]`, from each generated token's log-probabilities by token id."""
    found = np.full((len(rows), max(map(len, rows))), -np.inf, dtype=np.float64)
    for index, row in enumerate(rows):
        found[index, list(row)] = list(row.values())
    return found


def mean_interval(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """95% confidence interval of the mean, by bootstrap over the values; the same values give the same interval."""
    data = np.asarray(values)
    draws = np.random.default_rng(0).integers(0, len(data), (resamples, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def share_interval(hits: int, of: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson 1927), which is also one where all or none are hits."""
    z, share = 1.96, hits / of
    middle = share + z * z / (2 * of)
    around = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return (middle - around) / (1 + z * z / of), (middle + around) / (1 + z * z / of)


def _f1(shared: int, found: int, gold: int) -> float:
    if not found or not gold:
        return float(found == gold)
    return 2 * shared / (found + gold)
