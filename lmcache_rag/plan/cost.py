"""What is faster: to load a chunk's stored KV and repair it, or to compute it; and whether a blend pays at all, since
it costs something however short the prompt is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lmcache_rag.plan.budget import share_of
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment

PROBE_TOKENS = 64
"""The question is probed with its last tokens only, this many at most."""

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
        prefill_tokens_per_s: of each further token of a pass, attention apart, measured at start-up; plain prefill is
            not faster.
        load_bytes_per_s: of reading stored objects, by the tier that they were in; nothing where nothing was read.
        pass_s: what a pass takes however few its tokens (reading the weights), measured at start-up.
        key_s: what a token takes more for each one before it, measured at start-up.
        held_s: what reading a token's KV from the paged cache takes, measured at start-up; None where that cannot be.
        overhead_s: what a blend takes beyond loading and computing: the least of the last few.
    """

    prefill_tokens_per_s: float
    load_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    pass_s: float = 0.0
    key_s: float = 0.0
    held_s: float | None = None
    overhead_s: float = 0.0

    def prefill_s(self, start: float, end: float) -> float:
        """What the tokens from `start` to `end` take, besides what their pass does."""
        return self._tokens_s(end - start, (start + end) / 2)

    def computing_s(self, plan: BlendPlan) -> float:
        """What probe and repair take, and what lacks its KV."""
        named = plan.known
        missing = plan.end - plan.held_tokens - sum(segment.length for segment in named)
        missing_s = self._tokens_s(missing, (plan.held_tokens + plan.end) / 2)
        ratio = 1.0 if plan.selector == "all" else plan.ratio
        repaired_s = sum(
            share_of(ratio, foreign=segment.foreign) * self.prefill_s(segment.start, segment.end)
            for segment in named
            if not segment.exact
        )
        if plan.selector == "none" or not repaired_s:
            return missing_s + (self.pass_s if missing else 0.0)
        probed = min(PROBE_TOKENS, len(plan.token_ids) - plan.end)
        return missing_s + self._tokens_s(probed, plan.end) + repaired_s + 2 * self.pass_s

    def reading_s(self, plan: BlendPlan) -> float:
        """What reading of the paged cache takes."""
        return plan.held_tokens * (self.held_s or 0.0)

    def _tokens_s(self, tokens: float, keys: float) -> float:
        return tokens * (1 / self.prefill_tokens_per_s + keys * self.key_s)


class CostModel:
    """Decides from the rates measured last, chunk by chunk and then for the whole prompt."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates: Rates | None = None
        self._loads: dict[str, tuple[float, float]] = {}
        self._blended_at = 0.0

    @property
    def held_s(self) -> float | None:
        """What reading a token's KV from the paged cache takes; None where that cannot be, or nobody knows yet."""
        return None if self._rates is None else self._rates.held_s

    def learn(self, rates: Rates) -> None:
        """Take over what was measured in a blend; a tier's rate is kept where nothing was read from it."""
        self._blended_at = self._clock()
        self._loads |= {tier: (rate, self._blended_at) for tier, rate in rates.load_bytes_per_s.items()}
        self._rates = rates

    def worth_loading(self, segment: PlannedSegment, ratio: float, among: int = 1) -> bool:
        """Whether loading a segment's object and recomputing `ratio` of its tokens is faster than computing all of
        them. Where nothing is known it is taken to be.

        Args:
            among: how many objects the prompt has.
        """
        rates, loading_s = self._rates, self._loading_s(segment.size_bytes, segment.tier)
        if rates is None or loading_s is None:
            return True
        return loading_s < max(_NEGLIGIBLE_S / among, (1 - ratio) * rates.prefill_s(segment.start, segment.end))

    def worth_blending(self, plan: BlendPlan, held_tokens: int = 0) -> bool:
        """Whether loading, probe and repair together are faster than computing all tokens that the blend is to provide,
        but for the first ones that are held already. Where nothing is known they are taken to be, if there is less to
        compute."""
        rates = self._rates
        if rates is None:
            return not held_tokens or Rates(1.0).computing_s(plan) < plan.end - held_tokens
        overhead_s = rates.overhead_s if self._clock() - self._blended_at <= REMEMBERED_S else 0.0
        loading_s = sum(self._loading_s(size, tier) or 0.0 for tier, size in plan.bytes_by_tier.items())
        blending_s = loading_s + rates.reading_s(plan) + rates.computing_s(plan) + overhead_s
        return blending_s < rates.prefill_s(held_tokens, plan.end)

    def _loading_s(self, size_bytes: int, tier: str) -> float | None:
        """None where nobody knows how fast the tier is."""
        rate, at = self._loads.get(tier, (0.0, -math.inf))
        return size_bytes / rate if self._clock() - at <= REMEMBERED_S else None
