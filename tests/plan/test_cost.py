"""When loading is worth it."""

from __future__ import annotations

import pytest

from lmcache_rag.plan.cost import CostModel, Rates

MB = 1_000_000


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
    cost.learn(Rates(prefill_tokens_per_s=1000, load_bytes_per_s=bytes_per_s))
    assert cost.worth_loading(40 * MB, tokens=1000, ratio=ratio) is worth


def test_what_is_not_known_or_costs_next_to_nothing_is_tried() -> None:
    cost = CostModel()
    assert cost.worth_loading(40 * MB, 1000, 0.15)
    cost.learn(Rates(1000, None))
    assert cost.worth_loading(40 * MB, 1000, 0.15)
    cost.learn(Rates(1e6, 1 * MB))
    assert cost.worth_loading(1000, 10, 0.15)
    assert not cost.worth_loading(40 * MB, 1000, 0.15)


def test_a_slow_store_is_tried_again_after_a_minute_and_not_forgotten_before() -> None:
    now = 0.0
    cost = CostModel(clock=lambda: now)
    cost.learn(Rates(1000, 1 * MB))
    cost.learn(Rates(1000, None))  # a request that loads nothing
    now = 59.0
    assert not cost.worth_loading(40 * MB, 1000, 0.15)
    now = 61.0
    assert cost.worth_loading(40 * MB, 1000, 0.15)
