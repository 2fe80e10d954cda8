"""Winnowing: every window has one of its smallest hashes, and repeated text few."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_rag.records.fingerprints import GRAM, WINDOW, gram_hashes, winnow


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=0, max_size=200), st.lists(st.integers(0, 50_000), max_size=80))
def test_every_window_has_one_of_its_smallest(low: list[int], high: list[int]) -> None:
    hashes = gram_hashes(np.array([*low, *high, *low], dtype=np.int32))
    kept = winnow(hashes)
    assert (np.diff(kept) > 0).all()
    hashes >>= np.uint64(len(hashes).bit_length())  # the lowest bits decide nothing
    for start in range(len(hashes) - WINDOW + 1):
        inside = kept[(kept >= start) & (kept < start + WINDOW)]
        assert (hashes[inside] == hashes[start : start + WINDOW].min()).any()


def test_equal_runs_have_equal_hashes_and_others_do_not() -> None:
    text = np.arange(100, dtype=np.int32)
    hashes = gram_hashes(np.concatenate([text, text]))
    assert (hashes[: 100 - GRAM + 1] == hashes[100:]).all()
    assert len(np.unique(hashes[:100])) == 100


@pytest.mark.parametrize("length", [0, 1, GRAM - 1, GRAM, GRAM + WINDOW - 2])
def test_too_short_for_a_fingerprint(length: int) -> None:
    assert not len(winnow(gram_hashes(np.arange(length, dtype=np.int32))))


def test_a_run_of_one_token_has_few() -> None:
    assert len(winnow(gram_hashes(np.full(512, 7, dtype=np.int32)))) <= 56


def test_ordinary_text_has_two_in_eighteen() -> None:
    hashes = gram_hashes(np.random.default_rng(0).integers(0, 50_000, 10_000).astype(np.int32))
    assert len(winnow(hashes)) == pytest.approx(2 / (WINDOW + 1) * len(hashes), rel=0.05)
