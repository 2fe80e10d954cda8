"""From a target to a ratio."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from lmcache_rag.errors import ModelError
from lmcache_rag.plan.budget import ASSUMED, Calibration, calibration_of, ratio_of_foreign, share_of

CURVE = Calibration(points=((0.0, 0.2), (0.1, 0.1), (0.2, 0.04)), questions=9)


@pytest.mark.parametrize(
    ("target", "ratio"),
    [(0.5, 0.0), (0.2, 0.0), (0.15, 0.05), (0.1, 0.1), (0.07, 0.15), (0.04, 0.2), (0.02, 0.6), (1e-9, 1.0)],
)
def test_ratio_for_a_target(target: float, ratio: float) -> None:
    assert CURVE.ratio_for(target) == pytest.approx(ratio, abs=0.0011)


def test_where_noise_makes_the_curve_rise_the_larger_ratio_is_taken() -> None:
    noisy = calibration_of([(0.2, 0.12), (0.1, 0.1), (0.0, 0.2), (0.3, 0.05)], 9)
    assert noisy.ratio_for(0.1) == pytest.approx(0.1, abs=0.0011)
    assert 0.1 < noisy.ratio_for(0.09) <= 0.3
    assert noisy.ratio_for(0.05) == pytest.approx(0.3, abs=0.0011)


def test_a_model_that_reuses_perfectly_needs_nothing() -> None:
    assert Calibration(points=((0.0, 0.0),), questions=1).ratio_for(1e-6) == 0.0


@pytest.mark.parametrize(
    "points",
    [(), ((0.1, 0.2),), ((0.0, 0.2), (0.0, 0.1)), ((0.0, 0.2), (1.0, 0.1)), ((0.0, -1.0),), ((0.0, float("nan")),)],
)
def test_impossible_points(points: tuple) -> None:
    with pytest.raises(ValidationError):
        Calibration(points=points, questions=1)


def test_it_is_kept_by_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = CURVE.write(tmp_path, "abc", "raw")
    assert Calibration.read(tmp_path, "abc", "raw") == CURVE
    assert Calibration.read(tmp_path, "abc", "small") == ASSUMED
    assert Calibration.read(tmp_path, "another", "raw") == ASSUMED
    path.write_text("{")
    assert Calibration.read(tmp_path, "abc", "raw") == ASSUMED
    assert "calibrate` again" in caplog.text


def test_a_model_whose_distributions_are_no_numbers_is_not_calibrated() -> None:
    with pytest.raises(ModelError, match="cannot be calibrated"):
        calibration_of([(0.0, float("nan"))], 3)
    assert calibration_of([(0.0, -1e-9)], 3).points == ((0.0, 0.0),)


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0.0), (0.05, 0.1), (0.08, 0.16), (0.15, 0.23), (0.95, 1.0)])
def test_what_stands_behind_another_preamble_costs_a_little_more(ratio: float, share: float) -> None:
    assert share_of(ratio, foreign=True) == pytest.approx(share)
    assert share_of(ratio, foreign=False) == ratio
    if share < 1:
        assert ratio_of_foreign(share) == pytest.approx(ratio)
