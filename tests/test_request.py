"""The parameters of a request."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from lmcache_rag.blend import SELECTORS
from lmcache_rag.errors import PromptError
from lmcache_rag.request import BlendOptions, ReuseReport, SelectorName


def test_every_selector_can_be_named() -> None:
    assert set(get_args(SelectorName)) == set(SELECTORS)


def test_round_trip() -> None:
    options = BlendOptions(selector="head", ratio=0.25, segments=((3, 4), (7, 1)), namespace="tenant-1")
    assert BlendOptions(**options.to_params()["lmcache_rag"]) == options


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": "much"}, "ratio"),
        ({"selector": "best"}, "selector"),
        ({"segments": [(5, 10), (12, 3)]}, "overlaps"),
        ({"segments": [(5, 0)]}, "empty"),
        ({"namespace": "../other"}, "namespace"),
        ({"namespace": ""}, "namespace"),
        ({"mode": "fast"}, "mode"),
        ({"ratios": 0.1}, "ratios"),
    ],
)
def test_impossible_values_name_the_field(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(PromptError, match=problem):
        BlendOptions.checked(**values)


def test_misses_add_up() -> None:
    report = ReuseReport()
    report.miss("absent", 5)
    report.miss("corrupt", 2)
    report.miss("absent", 1)
    assert report.missed_tokens == 8
    assert report.misses == {"absent": 6, "corrupt": 2}
