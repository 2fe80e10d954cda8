"""What goes first where there is too much: one function a policy, one registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """Stored objects, as columns.

    Attributes:
        tokens, size_bytes: int64.
        age_s: int64, since their last use.
    """

    tokens: np.ndarray
    size_bytes: np.ndarray
    age_s: np.ndarray

    def __len__(self) -> int:
        return len(self.age_s)


Policy = Callable[[Candidates], np.ndarray]
"""What each object is worth; the least goes first."""


def lru(candidates: Candidates) -> np.ndarray:
    """What was used longest ago goes first."""
    return -candidates.age_s.astype(np.float64)


def cost(candidates: Candidates) -> np.ndarray:
    """What saves little computing for its bytes and was not used for long goes first: GreedyDual-Size (Cao and Irani
    1997, "Cost-aware WWW proxy caching algorithms"), as in GDSF (Cherkasova 1998) without its count of hits.

    There an object's worth is cost / size at its last use, plus an inflation that grows as objects are evicted. The
    cost of computing is about its tokens. What other engines hit is known by the last use only, so no hits are counted,
    and time stands for the inflation: in the mean age of all objects it grows by their mean worth.
    """
    worth = candidates.tokens / np.maximum(candidates.size_bytes, 1)
    worth = worth / max(float(worth.mean()), 1e-30) if len(worth) else worth
    return worth - candidates.age_s / max(float(candidates.age_s.mean()), 1.0) if len(worth) else worth


EVICTION: Final[dict[str, Policy]] = {"lru": lru, "cost": cost}


def eviction_named(name: str) -> str:
    """The name of a policy. Raises `ValueError` where there is none of that name."""
    if name not in EVICTION:
        raise ValueError(f"there is no eviction {name!r}, choose from {', '.join(EVICTION)}")
    return name
