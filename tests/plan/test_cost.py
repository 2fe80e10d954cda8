"""When loading is worth it, and when a blend is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmcache_rag.plan.cost import CostModel, Rates
from lmcache_rag.plan.plan import BlendPlan, PlannedSegment

MB = 1_000_000


def chunk(tokens: int = 1000, *, start: int = 0, size_bytes: int = 40 * MB, tier: str = "") -> PlannedSegment:
    return PlannedSegment(start, tokens, name="chunk", size_bytes=size_bytes, tier=tier)


@pytest.mark.parametrize(
    ("bytes_per_s", "ratio", "worth"),
    [
        (1000 * MB, 0.15, True),
        (60 * MB, 0.15, True),
        (60 * MB, 0.5, False),
        (1 * MB, 0.0, False),
        (60 * MB, 1.0, False),
    ],
)
def test_loading_and_repairing_must_be_faster_than_computing(bytes_per_s: float, ratio: float, worth: bool) -> None:
    cost = CostModel()
    cost.learn(Rates(prefill_tokens_per_s=1000, load_bytes_per_s={"": bytes_per_s}))
    assert cost.worth_loading(chunk(), ratio) is worth


def test_what_is_not_known_or_costs_next_to_nothing_is_tried() -> None:
    cost = CostModel()
    assert cost.worth_loading(chunk(), 0.15)
    cost.learn(Rates(1000))
    assert cost.worth_loading(chunk(), 0.15)
    cost.learn(Rates(1e6, {"": 1 * MB}))
    assert cost.worth_loading(chunk(10, size_bytes=1000), 0.15)
    assert not cost.worth_loading(chunk(), 0.15)


def test_a_slow_store_is_tried_again_after_a_minute_and_not_forgotten_before() -> None:
    now = 0.0
    cost = CostModel(clock=lambda: now)
    cost.learn(Rates(1000, {"": 1 * MB}))
    cost.learn(Rates(1000))  # a request that loads nothing
    now = 59.0
    assert not cost.worth_loading(chunk(), 0.15)
    now = 61.0
    assert cost.worth_loading(chunk(), 0.15)


def blend_plan(
    tokens: int, ratio: float, *, selector: str = "query", stored: bool = True, size_bytes: int = MB
) -> BlendPlan:
    """A preamble of 20 tokens, one chunk, and a question of 30."""
    return BlendPlan(
        mode="blend",
        namespace="default",
        token_ids=tuple(range(20 + tokens + 30)),
        preamble=PlannedSegment(0, 20, name="preamble" if stored else None, exact=True),
        segments=(PlannedSegment(20, tokens, name="chunk", size_bytes=size_bytes),),
        end=20 + tokens,
        selector=selector,
        ratio=ratio,
    )


RATES = Rates(prefill_tokens_per_s=1000, load_bytes_per_s={"": 100 * MB}, pass_s=0.025)


@pytest.mark.parametrize(
    ("plan", "expected_s"),
    [
        (blend_plan(400, 0.15), 2 * 0.025 + 0.030 + 0.060),  # probe and repair read the weights once each
        (blend_plan(400, 0.15, stored=False), 2 * 0.025 + 0.030 + 0.060 + 0.020),
        (blend_plan(400, 0.15, selector="none"), 0.0),
        (blend_plan(400, 0.15, selector="all"), 2 * 0.025 + 0.030 + 0.400),
        (blend_plan(400, 0.0), 0.0),
        (blend_plan(400, 0.0, stored=False), 0.025 + 0.020),
    ],
)
def test_what_is_computed_takes_passes_and_tokens(plan: BlendPlan, expected_s: float) -> None:
    assert RATES.computing_s(plan) == pytest.approx(expected_s)


def test_a_blend_must_pay_with_all_that_it_costs() -> None:
    """Two passes and a question of 30 tokens take 80 ms: a prompt that is prefilled in less is not blended."""
    cost = CostModel()
    assert cost.worth_blending(blend_plan(20, 0.15, size_bytes=1 * MB))  # nothing is known
    cost.learn(RATES)
    assert not cost.worth_blending(blend_plan(60, 0.15, size_bytes=1 * MB))
    assert cost.worth_blending(blend_plan(120, 0.15, size_bytes=1 * MB))
    assert not cost.worth_blending(blend_plan(120, 0.15, size_bytes=10 * MB))
    assert not cost.worth_blending(blend_plan(120, 0.5, size_bytes=1 * MB))
    assert cost.worth_blending(blend_plan(60, 0.0, size_bytes=1 * MB))
    cost.learn(replace(RATES, overhead_s=0.05))
    assert not cost.worth_blending(blend_plan(120, 0.15, size_bytes=1 * MB))


def test_tokens_cost_more_the_more_they_attend_to() -> None:
    """Of 1000 tokens behind 4000 each takes 1 ms, and 1 ms more for each 1000 tokens before it."""
    rates = replace(RATES, key_s=1e-6)
    assert rates.prefill_s(4000, 5000) == pytest.approx(1000 * (0.001 + 0.0045))
    plan = blend_plan(4980, 0.1)
    probe_s, repair_s = 0.030 * (1 + 5.0), 0.498 * (1 + (20 + 5000) / 2 / 1000)
    assert rates.computing_s(plan) == pytest.approx(2 * 0.025 + probe_s + repair_s)
    cost = CostModel()
    for learned, worth in ((RATES, False), (rates, True)):
        cost.learn(replace(learned, load_bytes_per_s={"": 1000 * MB}))
        assert cost.worth_blending(blend_plan(4980, 0.2), held_tokens=4000) is worth
        assert cost.worth_loading(chunk(start=4000, size_bytes=2000 * MB), 0.15) is worth


def test_overhead_is_forgotten_after_a_minute_so_that_a_blend_is_tried_again() -> None:
    now = 0.0
    cost = CostModel(clock=lambda: now)
    cost.learn(replace(RATES, load_bytes_per_s={}, overhead_s=0.5))
    assert not cost.worth_blending(blend_plan(300, 0.15, size_bytes=1 * MB))
    now = 61.0
    assert cost.worth_blending(blend_plan(300, 0.15, size_bytes=1 * MB))
    assert not cost.worth_blending(blend_plan(60, 0.15, size_bytes=1 * MB))  # what a pass takes does not change


def test_each_tier_has_a_rate_of_its_own() -> None:
    cost = CostModel()
    cost.learn(Rates(1000, {"bucket": 1 * MB}))
    assert not cost.worth_loading(chunk(tier="bucket"), 0.15)
    assert cost.worth_loading(chunk(tier="disk"), 0.15)
    cost.learn(Rates(1000, {"disk": 1000 * MB}))  # what is known of the bucket is kept
    plan = blend_plan(400, 0.0, size_bytes=20 * MB)
    for tier, worth in (("bucket", False), ("disk", True)):
        segments = tuple(replace(segment, tier=tier) for segment in plan.segments)
        assert cost.worth_blending(replace(plan, segments=segments)) is worth
