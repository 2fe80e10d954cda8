"""Passages in the order of earlier prompts."""

from __future__ import annotations

import pytest

from lmcache_rag.conversation.order import PassageOrder


def ordered(order: PassageOrder, passages: str) -> str:
    return "".join(order.ordered(list(passages), key=lambda passage: passage))


def test_the_first_prompt_is_by_relevance() -> None:
    assert ordered(PassageOrder(), "dabc") == "dabc"
    assert ordered(PassageOrder(), "") == ""


@pytest.mark.parametrize(
    ("earlier", "passages", "expected"),
    [
        ("abcde", "bacde", "abcde"),
        ("abcde", "edcba", "abcde"),
        ("abcde", "xab", "abx"),
        ("abcde", "bca", "abc"),
        ("abcde", "cx", "cx"),  # it begins with a, which is not there
        ("abcde", "aecx", "aecx"),  # only a is a common beginning
    ],
)
def test_a_common_beginning_is_kept(earlier: str, passages: str, expected: str) -> None:
    order = PassageOrder()
    ordered(order, earlier)
    assert ordered(order, passages) == expected


def test_the_longest_beginning_is_taken_and_of_equals_the_last() -> None:
    order = PassageOrder()
    for earlier in ("abf", "abc", "dex", "dey"):
        ordered(order, earlier)
    assert ordered(order, "cba") == "abc"
    assert ordered(order, "zyxed") == "deyzx"


@pytest.mark.parametrize(("most_moved", "expected"), [(0, "cdeab"), (2, "cdeab"), (3, "abcde")])
def test_relevance_forbids_it(most_moved: int, expected: str) -> None:
    order = PassageOrder(most_moved)
    ordered(order, "abcde")
    assert ordered(order, "cdeab") == expected


def test_equal_passages_stay() -> None:
    order = PassageOrder()
    ordered(order, "aab")
    assert sorted(ordered(order, "baa")) == ["a", "a", "b"]


def test_what_was_prompted_long_ago_is_forgotten() -> None:
    order = PassageOrder(remembered=2)
    for earlier in ("ab", "cd", "ef"):
        ordered(order, earlier)
    assert ordered(order, "ba") == "ba" and ordered(order, "fe") == "ef"
