"""Which runs of a prompt were in an earlier one of the same caller."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lmcache_rag.conversation.recurrence import SHORTEST_RUN, RecentPrompts, Recurring, free_runs


def tokens(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(30000) for _ in range(count)]


PREAMBLE = tokens(1, 40)
A, B, C, D = (tokens(seed, 90 + seed) for seed in (10, 20, 30, 40))


def prompt(*passages: list[int], question: int) -> list[int]:
    return [*PREAMBLE, *(token for passage in passages for token in passage), *tokens(question, 20)]


def found(recurring: Recurring, token_ids: list[int]) -> list[list[int]]:
    return [token_ids[start : start + length] for start, length in recurring.runs]


def test_a_text_is_found_the_second_time() -> None:
    recent = RecentPrompts()
    assert recent.add(prompt(A, B, question=100), "") == Recurring()
    again = prompt(C, B, D, A, question=101)
    recurring = recent.add(again, "")
    assert found(recurring, again) == [B, A]
    assert recurring.preamble == len(PREAMBLE)


def test_what_several_prompts_have_is_cut_where_their_passages_end() -> None:
    recent = RecentPrompts()
    recent.add(prompt(D, A, question=102), "")
    recent.add(prompt(C, B, question=103), "")
    third = prompt(A, B, question=104)
    recurring = recent.add(third, "")
    assert found(recurring, third) == [A, B] and recurring.preamble == len(PREAMBLE)


def test_the_common_beginning_is_the_prefix_caches() -> None:
    recent = RecentPrompts()
    recent.add(prompt(A, B, question=105), "")
    assert recent.add(prompt(A, B, question=106), "") == Recurring()
    assert recent.add([*prompt(A, B, question=105), *tokens(107, 200)], "") == Recurring()  # the next turn of a chat
    fourth = prompt(A, C, B, question=108)
    recurring = recent.add(fourth, "")
    assert found(recurring, fourth) == [B] and recurring.preamble == len(PREAMBLE) + len(A)


def test_one_caller_never_knows_of_anothers_prompts() -> None:
    recent = RecentPrompts()
    recent.add(prompt(A, B, question=109), "one")
    assert recent.add(prompt(B, A, question=110), "another") == Recurring()
    assert recent.add(prompt(C, A, question=111), "one").runs
    assert recent.add(prompt(D, B, question=112), "another").runs


@pytest.mark.parametrize(("length", "runs"), [(SHORTEST_RUN - 1, 0), (SHORTEST_RUN, 1)])
def test_short_runs_are_not_worth_it(length: int, runs: int) -> None:
    recent = RecentPrompts()
    text = tokens(50, length)
    recent.add(prompt(A, text, question=113), "")
    assert len(recent.add(prompt(text, question=114), "").runs) == runs


def test_a_text_that_is_repeated_within_one_prompt_was_seen_once() -> None:
    assert RecentPrompts().add(prompt(A, A, B, B, question=115), "") == Recurring()


@pytest.mark.parametrize("limits", [{"most_prompts": 3}, {"most_tokens": 800}])
def test_what_was_asked_longest_ago_is_forgotten(limits: dict[str, int]) -> None:
    recent = RecentPrompts(**limits)
    recent.add(prompt(A, question=116), "")
    for question in range(117, 127):
        recent.add(prompt(tokens(question, 200), question=question), "")
        assert len(recent) <= 3 and recent.fingerprints <= 3 * 2 * 260 // 17
    assert recent.add(prompt(B, A, question=130), "") == Recurring()
    assert recent.add(prompt(C, A, question=131), "").runs


def test_a_run_is_learned_as_far_as_it_is_not_stored() -> None:
    taken = np.zeros(1000, bool)
    taken[150:300] = taken[420:490] = True
    assert free_runs([(100, 200), (300, 200), (600, 80)], taken) == ((300, 120), (600, 80))


def test_an_empty_prompt_and_a_monotonous_one() -> None:
    recent = RecentPrompts()
    for token_ids in ([], [7] * 500, [7] * 500, [5, 6] * 300):
        recent.add(token_ids, "")
    recurring = recent.add([1, *[7] * 500], "")
    assert found(recurring, [1, *[7] * 500])
