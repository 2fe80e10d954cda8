"""Selectors: which tokens of the reused chunks are recomputed, given how many.

Each is one small class behind one method; to add one, write it here and name it in `SELECTORS` and in
`lmcache_rag.request.SelectorName`. All tests and benchmarks then pick it up.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lmcache_rag.blend.steps import Steps, done
from lmcache_rag.plan.plan import PlannedSegment


class Selection(Protocol):
    """What a selector may look at.

    Attributes:
        candidates: bool `[end]`: reused tokens that may be recomputed (those whose KV is exact need not be).
        budget: how many may be recomputed, at most as many as there are candidates.
        segments: the reused segments.
        layers: the model's number of layers.
    """

    candidates: Tensor
    budget: int
    segments: tuple[PlannedSegment, ...]
    layers: int

    def question_attention(self, first_layer: int) -> Steps[Tensor]:
        """Attention that each token gets from the question over the reused KV, summed over the question's tokens,
        the heads, and the layers from `first_layer` on: float32 `[end]`. Costs one pass of the question's tokens."""
        ...

    def value_deviation(self, layer: int) -> Steps[Tensor]:
        """Squared distance of each token's recomputed V in `layer` from the reused one: float32 `[end]`. Costs one
        pass of all tokens through the layers up to this one, whose K and V are then kept."""
        ...


class Selector(Protocol):
    """Chooses the tokens to recompute.

    Attributes:
        depth: the share of the layers, from the first one, in which the chosen tokens are recomputed.
        extrapolates: whether the other tokens take over their change; see `extrapolation.Extrapolation`.
    """

    name: ClassVar[str]
    depth: ClassVar[float]
    extrapolates: ClassVar[bool]

    def select(self, selection: Selection) -> Steps[Tensor]:
        """Positions to recompute, int64, candidates only, `selection.budget` at most, in any order. It pauses where a
        pass is run."""
        ...


class NoneSelector:
    """Nothing is recomputed: plain reuse, as in Prompt Cache (Gim et al. 2024, https://arxiv.org/abs/2311.04934)."""

    name: ClassVar[str] = "none"
    depth: ClassVar[float] = 1.0
    extrapolates: ClassVar[bool] = False

    def select(self, selection: Selection) -> Steps[Tensor]:
        return done(torch.zeros(0, dtype=torch.int64, device=selection.candidates.device))


class AllSelector:
    """Every candidate, whatever the budget: full prefill by our own passes."""

    name: ClassVar[str] = "all"
    depth: ClassVar[float] = 1.0
    extrapolates: ClassVar[bool] = False

    def select(self, selection: Selection) -> Steps[Tensor]:
        return done(selection.candidates.nonzero().flatten())


class HeadSelector:
    """The first tokens of each chunk, in equal shares, as in EPIC (Hu et al. 2024, https://arxiv.org/abs/2410.15332)."""

    name: ClassVar[str] = "head"
    depth: ClassVar[float] = 1.0
    extrapolates: ClassVar[bool] = False

    def select(self, selection: Selection) -> Steps[Tensor]:
        depth = torch.full(selection.candidates.shape, torch.inf, device=selection.candidates.device)
        for segment in selection.segments:
            depth[segment.start : segment.end] = torch.arange(segment.length, device=depth.device) / segment.length
        return done(_top(-depth, selection))


class CacheBlendSelector:
    """The tokens whose V deviates most at a check layer, as in CacheBlend (Yao et al. 2025,
    https://arxiv.org/abs/2405.16444): all tokens are recomputed up to layer 1, then only the chosen ones."""

    name: ClassVar[str] = "cacheblend"
    depth: ClassVar[float] = 1.0
    extrapolates: ClassVar[bool] = False
    check_layer: ClassVar[int] = 1

    def select(self, selection: Selection) -> Steps[Tensor]:
        deviation = yield from selection.value_deviation(min(self.check_layer, selection.layers - 1))
        return _top(deviation, selection)


class QuerySelector:
    """The tokens that the question attends to most in the upper two thirds of the layers, read off the reused KV (the
    signal of ProphetKV and InfoFlow KV, 2026), where half of what a token's neighbours get counts too. In the last
    layers it hardly matters where their KV comes from, so they are recomputed in the layers below only. What that
    changes in them is carried over to the other tokens. See docs/blending.md."""

    name: ClassVar[str] = "query"
    depth: ClassVar[float] = 5 / 6
    extrapolates: ClassVar[bool] = True

    def select(self, selection: Selection) -> Steps[Tensor]:
        attention = yield from selection.question_attention(selection.layers // 3)
        attention = attention * selection.candidates
        beside = torch.nn.functional.pad(attention, (1, 1))
        return _top(attention + (beside[:-2] + beside[2:]) / 2, selection)


def _top(score: Tensor, selection: Selection) -> Tensor:
    """The candidates with the highest score, as many as the budget allows; of equals the first, on every machine."""
    score = torch.where(selection.candidates, score, -torch.inf)
    return score.argsort(descending=True, stable=True)[: selection.budget]


SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (NoneSelector(), AllSelector(), HeadSelector(), CacheBlendSelector(), QuerySelector())
}
