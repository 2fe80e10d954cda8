"""What is faster: to load a chunk's stored KV and repair it, or to compute it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

REMEMBERED_S = 60.0
"""A store that was slow may have become fast: after so long it is tried again."""

_NEGLIGIBLE_S = 0.02
"""Loading a whole prompt's chunks in less is not worth a thought."""

GIVE_UP_SHARE = 0.5
"""Loading is given up when it has taken this share of the time that computing takes."""


@dataclass(frozen=True)
class Rates:
    """What was measured where the model runs.

    Attributes:
        prefill_tokens_per_s: of a pass over a few hundred tokens at start-up; plain prefill is not slower.
        load_bytes_per_s: of reading stored objects; None where nothing was read.
    """

    prefill_tokens_per_s: float
    load_bytes_per_s: float | None = None


class CostModel:
    """Decides chunk by chunk, from the rates measured last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates: Rates | None = None
        self._learned_at = 0.0

    def learn(self, rates: Rates) -> None:
        """Take over what was just measured; the load rate is kept where nothing was loaded."""
        if rates.load_bytes_per_s is not None:
            self._rates, self._learned_at = rates, self._clock()

    def worth_loading(self, size_bytes: int, tokens: int, ratio: float, among: int = 1) -> bool:
        """Whether loading an object and recomputing `ratio` of its tokens is faster than computing all of them. Where
        nothing is known it is taken to be.

        Args:
            among: how many objects the prompt has.
        """
        rates = self._rates
        if rates is None or rates.load_bytes_per_s is None or self._clock() - self._learned_at > REMEMBERED_S:
            return True
        loading_s, computing_s = size_bytes / rates.load_bytes_per_s, tokens / rates.prefill_tokens_per_s
        return loading_s < max(_NEGLIGIBLE_S / among, (1 - ratio) * computing_s)
