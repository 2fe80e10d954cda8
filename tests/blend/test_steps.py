"""Pausing where no more may be computed."""

from __future__ import annotations

import math

import pytest

from lmcache_rag.blend.steps import LEAST_TOKENS, Allowance, done, finished, next_of


def test_alone_nothing_pauses() -> None:
    allowance = Allowance()
    assert allowance.alone and next_of(allowance.take(10**6)) == 10**6


def test_what_may_be_computed_is_taken_and_then_it_pauses() -> None:
    allowance = Allowance()
    allowance.tokens = 100
    assert not allowance.alone and next_of(allowance.take(70)) == 70
    assert next_of(allowance.take(70)) == 30
    steps = allowance.take(70)
    assert next_of(steps) is None and next_of(steps) is None
    allowance.tokens = math.inf
    assert next_of(steps) == 70


@pytest.mark.parametrize(("tokens", "wanted", "taken"), [(LEAST_TOKENS - 1, 70, None), (3, 4, None), (5, 4, 4)])
def test_a_few_tokens_are_not_worth_a_pass_unless_they_are_the_last(
    tokens: int, wanted: int, taken: int | None
) -> None:
    allowance = Allowance()
    allowance.tokens = tokens
    assert next_of(allowance.take(wanted)) == taken


def test_results() -> None:
    assert finished(done(5)) == 5
