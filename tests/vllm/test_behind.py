"""Passages behind text whose KV vLLM's prefix cache holds: the blend begins behind that."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from lmcache_rag.engine import Completion, LocalEngine, Sampling
from lmcache_rag.plan.cost import CostModel
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions
from lmcache_rag.vllm.choosing import Chooser, Held
from lmcache_rag.vllm.paged import PagedCache
from tests.conftest import Engines
from tests.helpers import OFF, answer, connector, fix_rates, ingest, noise, parts, random_plan
from tests.vllm.apps import settings_in

REPAIR = BlendOptions(ratio=0.2)
EVERYTHING = BlendOptions(ratio=1.0)


@pytest.fixture(scope="module")
def engine(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    engines.close()
    with LocalEngine(settings_in(tmp_path_factory.mktemp("behind"), primed=False, learn="off")) as engine:
        fix_rates(engine)
        yield engine


def some_tokens(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(4, 380) for _ in range(count)]


def stored_plan(engine: LocalEngine, seed: int, chunks: tuple[int, ...] = (100, 100)) -> MarkedPrompt:
    plan = random_plan(seed, chunks=chunks)
    ingest(engine, plan)
    return plan


def ask(
    engine: LocalEngine, prompt: MarkedPrompt | list[int], options: BlendOptions = REPAIR, salt: str = "own"
) -> Completion:
    return engine.generate(prompt, Sampling(max_tokens=8, ignore_eos=True), options, cache_salt=salt)


def with_more(said: list[int], plan: MarkedPrompt) -> MarkedPrompt:
    """The passages and the question of a plan behind what was said."""
    _, chunks, question = parts(plan)
    return MarkedPrompt.assemble(said, chunks, question)


def test_passages_behind_exact_kv_are_blended(engine: LocalEngine) -> None:
    """An agent's: a long history that no store holds, and then what a tool has found."""
    said = some_tokens(300, 576)
    ask(engine, said)
    turn = with_more(said, stored_plan(engine, 301))
    done = ask(engine, turn)
    assert done.reuse.mode == "blend"
    assert done.reuse.local_tokens == 576 and done.reuse.continued_tokens == 0
    assert done.reuse.reused_tokens + done.reuse.recomputed_tokens == 200 and done.reuse.recomputed_tokens < 150
    assert done.reuse.unknown_tokens == 0


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored text is blended, also where computing it is as fast."""
    for question in ("worth_blending", "worth_loading"):
        monkeypatch.setattr(CostModel, question, lambda *_: True)


@pytest.mark.usefixtures("always")
def test_all_repaired_behind_exact_kv_it_is_full_prefill(engine: LocalEngine) -> None:
    said = some_tokens(302, 520)
    ask(engine, said)
    turn = with_more(said, stored_plan(engine, 303))
    tolerance = 20 * noise(engine, turn)
    found, done = answer(engine, turn, EVERYTHING, "own")
    assert done.reuse.mode == "blend" and done.reuse.local_tokens == 512
    expected, _ = answer(engine, turn, OFF)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def turns(engine: LocalEngine, seeds: range, options: BlendOptions) -> Iterator[tuple[MarkedPrompt, Completion]]:
    """A conversation in which each turn brings passages, without a pause."""
    said = parts(random_plan(seeds[0]))[0]
    for seed in seeds:
        turn = with_more(said, stored_plan(engine, seed))
        done = ask(engine, turn, options, f"turns {seeds}")
        yield turn, done
        said = [*turn.token_ids, *done.token_ids]


def test_each_turn_is_blended_behind_the_one_before(engine: LocalEngine) -> None:
    asked = list(turns(engine, range(310, 314), REPAIR))
    assert [done.reuse.mode for _, done in asked] == ["blend"] * 4
    for (before, _), (_, done) in itertools.pairwise(asked):
        report = done.reuse
        assert report.local_tokens >= len(before.token_ids) // 32 * 32
        assert 0 < report.continued_tokens <= report.local_tokens
        assert report.reused_tokens + report.recomputed_tokens == 200
        assert report.unknown_tokens < 32  # behind the last whole block
    (turn, done), salt = asked[-1], f"turns {range(310, 314)}"
    again = ask(engine, turn, salt=salt)
    assert again.reuse.mode in ("blend", "continued") and again.token_ids == done.token_ids
    assert again.reuse.prompt_tokens - again.reuse.local_tokens <= 64  # the third blend's names are found, too


@pytest.mark.usefixtures("always")
def test_all_repaired_in_each_turn_it_is_full_prefill(engine: LocalEngine) -> None:
    *_, (turn, _) = turns(engine, range(320, 323), EVERYTHING)
    salt = f"turns {range(320, 323)}"
    following = with_more([*turn.token_ids, *some_tokens(1, 20)], stored_plan(engine, 323))
    tolerance = 20 * noise(engine, following)
    found, done = answer(engine, following, EVERYTHING, salt)
    assert done.reuse.mode == "blend" and done.reuse.continued_tokens > 500
    expected, _ = answer(engine, following, OFF)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_what_is_said_behind_it_is_exact_when_there_was_time(engine: LocalEngine) -> None:
    *_, (turn, done) = turns(engine, range(330, 332), REPAIR)
    engine.settle()
    following = MarkedPrompt((*turn.token_ids, *done.token_ids, *some_tokens(2, 30)), 21, ())
    tolerance = 20 * noise(engine, following)
    found, exact = answer(engine, following, REPAIR, f"turns {range(330, 332)}")
    assert exact.reuse.reason == "exact KV in the local prefix cache"
    expected, _ = answer(engine, following, OFF)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_another_question_over_the_same_passages_and_more_is_blended_anew(engine: LocalEngine) -> None:
    """What the passages were repaired for was another question."""
    plan, more = stored_plan(engine, 340), stored_plan(engine, 341)
    ask(engine, plan)
    preamble, chunks, _ = parts(plan)
    other = MarkedPrompt.assemble(preamble, [*chunks, *parts(more)[1]], some_tokens(342, 80))
    report = ask(engine, other).reuse
    assert report.mode == "blend" and report.continued_tokens == 0
    assert report.reused_tokens + report.recomputed_tokens > 300


@pytest.mark.parametrize("other", [BlendOptions(ratio=0.5), BlendOptions(ratio=0.2, selector="cacheblend")])
def test_nothing_is_blended_behind_what_was_made_otherwise(engine: LocalEngine, other: BlendOptions) -> None:
    plan, more = stored_plan(engine, 350), stored_plan(engine, 351)
    done = ask(engine, plan)
    turn = with_more([*plan.token_ids, *done.token_ids], more)
    report = ask(engine, list(turn.token_ids), other).reuse
    assert report.mode == "blend" and report.continued_tokens == 0
    assert report.local_tokens < 121 and report.reused_tokens + report.recomputed_tokens > 300


def test_a_last_question_that_is_asked_anew_is_blended_behind_the_turn_before(engine: LocalEngine) -> None:
    (first, _), (turn, _) = turns(engine, range(356, 358), REPAIR)
    said = list(turn.token_ids[: len(turn.token_ids) - 213])  # without the last turn's passages and question
    other = with_more(said, stored_plan(engine, 358))
    report = ask(engine, other, salt=f"turns {range(356, 358)}").reuse
    assert report.mode == "blend" and 0 < report.continued_tokens <= report.local_tokens
    assert len(first.token_ids) - 32 <= report.local_tokens <= len(said)
    assert report.reused_tokens + report.recomputed_tokens == 200


def test_a_looser_blend_behind_one_is_continued_as_a_looser_one(engine: LocalEngine) -> None:
    plan, more = stored_plan(engine, 352), stored_plan(engine, 353)
    done = ask(engine, plan)
    turn = with_more([*plan.token_ids, *done.token_ids], more)
    second = ask(engine, turn, BlendOptions(ratio=0.1))
    assert second.reuse.continued_tokens > 0
    following = [*turn.token_ids, *second.token_ids, *some_tokens(354, 100)]
    assert ask(engine, following, REPAIR).reuse.continued_tokens <= len(plan.token_ids) + 8
    assert ask(engine, following, BlendOptions(ratio=0.1)).reuse.mode == "continued"


def test_what_left_the_cache_meanwhile_is_computed(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = some_tokens(360, 576)
    ask(engine, said, salt="before")
    turn = with_more(said, stored_plan(engine, 361))
    expected, _ = answer(engine, turn, OFF)
    tolerance = 20 * noise(engine, turn)
    held = Chooser.held

    def stale(chooser: Chooser, request: object, names: object, options: BlendOptions) -> Held:
        found = held(chooser, request, names, options)  # type: ignore[arg-type]
        return Held(576, None, 576, found.names)

    monkeypatch.setattr(Chooser, "held", stale)
    found, done = answer(engine, turn, REPAIR, "after")
    assert done.reuse.mode == "plain" and "left the prefix cache" in done.reuse.reason
    assert done.reuse.vllm_tokens + done.reuse.missed_tokens == len(turn.token_ids)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_what_cannot_be_read_is_computed(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = some_tokens(370, 576)
    ask(engine, said)
    turn = with_more(said, stored_plan(engine, 371))
    expected, _ = answer(engine, turn, OFF)
    tolerance = 20 * noise(engine, turn)

    def failing(*_: object) -> None:
        raise RuntimeError("not read")

    with monkeypatch.context() as patch:
        patch.setattr(PagedCache, "read", failing)
        found, done = answer(engine, turn, REPAIR, "own")
    assert done.reuse.mode == "plain" and done.reuse.failure == "RuntimeError"
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    found, _ = answer(engine, turn, OFF, "own")
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_a_blend_that_fails_behind_an_earlier_answer_is_approximate_all_the_same(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, more = stored_plan(engine, 375), stored_plan(engine, 376)
    done = ask(engine, plan)
    turn = with_more([*plan.token_ids, *done.token_ids], more)

    def failing(*_: object) -> None:
        raise RuntimeError("not read")

    with monkeypatch.context() as patch:
        patch.setattr(PagedCache, "read", failing)
        second = ask(engine, turn)
    assert (second.reuse.mode, second.reuse.failure) == ("continued", "RuntimeError")
    assert second.reuse.continued_tokens > 0 and second.reuse.vllm_tokens + second.reuse.missed_tokens > 200
    following = [*turn.token_ids, *second.token_ids, *some_tokens(377, 80)]
    third = ask(engine, following)
    assert third.reuse.mode == "continued" and third.reuse.local_tokens >= len(turn.token_ids) - 32
    engine.settle()
    assert ask(engine, following).reuse.reason == "exact KV in the local prefix cache"


def test_without_a_readable_cache_the_history_is_kept_and_the_rest_computed(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = connector(engine).scheduler._planner.cost
    monkeypatch.setattr(type(cost), "held_s", None)
    said = some_tokens(380, 576)
    ask(engine, said)
    report = ask(engine, with_more(said, stored_plan(engine, 381))).reuse
    assert report.mode == "plain" and report.local_tokens == 576
