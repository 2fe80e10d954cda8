"""Which answered prompts a prompt continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from lmcache_rag.conversation.answers import Answered, Answers, Salt, Terms

TERMS = Terms(cache_salt=None, namespace="default", selector="query", hurried=False)


def answered(token_ids: range, *, ratio: float = 0.1, digest: str = "aa", turns: int = 1) -> Answered:
    tokens = np.array(token_ids, dtype=np.int32)
    return Answered(tokens, len(tokens) - 8, TERMS, ratio, salts=(Salt(1, digest),), turns=turns)


def digests(found: Sequence[Answered]) -> list[str]:
    return [answered.salts[-1].digest for answered in found]


def test_the_longest_common_beginning_comes_first() -> None:
    answers = Answers()
    answers.add(answered(range(50), digest="aa"))
    answers.add(answered(range(80), digest="bb"))
    answers.add(answered(range(1, 80), digest="cc"))  # begins otherwise
    assert digests(answers.continued_by(range(100), TERMS, 0.1)) == ["bb", "aa"]
    assert digests(answers.continued_by(range(10), TERMS, 0.1)) == ["aa", "bb"]
    assert digests(answers.continued_by(range(100), TERMS, 0.1, least=50)) == ["bb"]
    assert answers.continued_by([], TERMS, 0.1) == []


@pytest.mark.parametrize(
    "other", [{"cache_salt": "salt"}, {"namespace": "other"}, {"selector": "cacheblend"}, {"hurried": True}]
)
def test_what_was_made_otherwise_is_not_inherited(other: dict) -> None:
    answers = Answers()
    answers.add(answered(range(50)))
    assert answers.continued_by(range(60), replace(TERMS, **other), 0.1) == []


def test_a_stricter_request_does_not_inherit_a_looser_blend() -> None:
    answers = Answers()
    answers.add(answered(range(50), ratio=0.1))
    assert answers.continued_by(range(60), TERMS, 0.11) == []
    assert len(answers.continued_by(range(60), TERMS, 0.05)) == 1


@pytest.mark.parametrize(
    ("prompt", "continues"),
    [
        ([*range(70)], True),
        ([*range(60), 90, 91], True),  # the prompt's own end, and another answer
        ([*range(56), 60, 61, 62, 63, 64], True),  # without what the prompt ended with, and the answer
        ([*range(56), 90, 91, 92, 93], False),  # another question
        ([*range(50), 60, 61, 62, 63], False),  # too much is missing
        ([*range(56)], False),
        ([*range(59)], False),
    ],
)
def test_what_goes_on_from_an_answer(prompt: list[int], continues: bool) -> None:
    said = np.arange(70, dtype=np.int32)  # of which the last ten are the answer
    earlier = Answered(said, 60, TERMS, 0.1, salts=(Salt(1, "aa"),))
    assert earlier.is_continued_by(prompt) == continues


def test_a_turn_takes_the_place_of_the_one_before() -> None:
    answers = Answers(remembered=2)
    answers.add(answered(range(50)))
    answers.add(answered(range(80), turns=2))
    assert [found.turns for found in answers.continued_by(range(90), TERMS, 0.1)] == [2]
    for digest in ("bb", "cc"):
        answers.add(answered(range(30), digest=digest))
    assert digests(answers.continued_by(range(90), TERMS, 0.1)) == ["bb", "cc"]
