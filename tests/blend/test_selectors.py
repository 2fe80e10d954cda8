"""Selectors on their own: what each looks at, and that none goes beyond its budget or its candidates."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lmcache_rag.blend import SELECTORS
from lmcache_rag.blend.steps import Steps, done, finished
from lmcache_rag.plan.plan import PlannedSegment

SEGMENTS = (PlannedSegment(4, 10, exact=True), PlannedSegment(14, 20), PlannedSegment(34, 10))
END = 44


@dataclass
class Looks:
    """A selection with made-up scores."""

    budget: int
    segments: tuple[PlannedSegment, ...] = SEGMENTS
    layers: int = 6
    asked: tuple[object, ...] = ()

    def __post_init__(self) -> None:
        self.candidates = torch.zeros(END, dtype=torch.bool)
        self.candidates[14:] = True
        self.scores = torch.rand(END, generator=torch.Generator().manual_seed(1))
        self.scores[:14] = 9.0  # not candidates, however high they score

    def question_attention(self, first_layer: int) -> Steps[torch.Tensor]:
        self.asked = ("attention", first_layer)
        return done(self.scores)

    def value_deviation(self, layer: int) -> Steps[torch.Tensor]:
        self.asked = ("deviation", layer)
        return done(self.scores)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("budget", [1, 7, 30])
def test_within_budget_and_candidates(name: str, budget: int) -> None:
    looks = Looks(budget)
    chosen = finished(SELECTORS[name].select(looks))
    assert chosen.dtype == torch.int64
    assert looks.candidates[chosen].all()
    assert len(chosen) == len(set(chosen.tolist())) == {"none": 0, "all": 30}.get(name, budget)


@pytest.mark.parametrize(
    ("name", "asked"), [("query", ("attention", 2)), ("cacheblend", ("deviation", 1)), ("head", ()), ("none", ())]
)
def test_what_each_one_looks_at(name: str, asked: tuple[object, ...]) -> None:
    looks = Looks(6)
    chosen = finished(SELECTORS[name].select(looks))
    assert looks.asked == asked
    if asked:
        scores = torch.where(looks.candidates, looks.scores, 0.0)
        if name == "query":  # neighbours count half
            scores = torch.tensor([scores[max(0, i - 1) : i + 2].sum() + scores[i] for i in range(END)])
        best = torch.where(looks.candidates, scores, -1.0).topk(6).indices
        assert set(chosen.tolist()) == set(best.tolist())


def test_head_takes_equal_shares_from_the_start_of_each_chunk() -> None:
    chosen = finished(SELECTORS["head"].select(Looks(6)))
    assert sorted(chosen.tolist()) == [14, 15, 16, 17, 34, 35]


def test_cacheblend_on_a_model_of_one_layer() -> None:
    looks = Looks(6, layers=1)
    finished(SELECTORS["cacheblend"].select(looks))
    assert looks.asked == ("deviation", 0)
