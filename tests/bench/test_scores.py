"""Scores with known values."""

from __future__ import annotations

import numpy as np
import pytest

from lmcache_rag.bench.scores import kl_divergence, mean_interval, rouge_l, share_interval, token_f1


@pytest.mark.parametrize(
    ("found", "reference", "score"),
    [
        ("the cat sat on the mat", "a cat sat on a mat!", 1.0),
        ("police killed the gunman", "gunman police killed", 2 * 2 / 6),
        ("one two three four", "two four", 2 * 2 / 6),
        ("nothing shared", "other words here", 0.0),
        ("", "", 1.0),
        ("", "something", 0.0),
    ],
)
def test_rouge_l(found: str, reference: str, score: float) -> None:
    assert rouge_l(found, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("found", "gold", "score"),
    [("Paris, France", "paris", 2 / 3), ("The Paris", "paris", 1.0), ("Rome", "Paris", 0.0), ("b a b", "b b", 1.0)],
)
def test_token_f1(found: str, gold: str, score: float) -> None:
    assert token_f1(found, gold) == pytest.approx(score)


def test_kl_divergence_of_known_distributions() -> None:
    first = np.log([[0.5, 0.5], [0.9, 0.1]])
    second = np.log([[0.25, 0.75], [0.9, 0.1]])
    expected = [0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), 0.0]
    assert kl_divergence(first, second) == pytest.approx(expected)


def test_the_interval_holds_the_mean_and_narrows() -> None:
    few, many = mean_interval([0.0, 1.0] * 5), mean_interval([0.0, 1.0] * 500)
    assert few[0] < 0.5 < few[1] and many[0] < 0.5 < many[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 5
    assert mean_interval([0.0, 1.0] * 5) == few


def test_the_interval_of_a_share() -> None:
    assert share_interval(9, 12) == pytest.approx((0.468, 0.911), abs=0.001)
    assert share_interval(10, 10) == pytest.approx((0.722, 1.0), abs=0.001)
    assert share_interval(0, 10) == pytest.approx((0.0, 0.278), abs=0.001)
