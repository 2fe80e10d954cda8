"""Prompts that extend answered ones, or ask over the same passages: continued at once, exact when there was time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lmcache_rag.engine import Completion, LocalEngine, Sampling
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions
from lmcache_rag.vllm.metadata import Refined
from tests.conftest import Engines
from tests.helpers import OFF, answer, connector, fix_rates, ingest, noise, parts, random_plan, worker_half
from tests.vllm.apps import settings_in

REPAIR = BlendOptions(ratio=0.2)
FOLLOWING = tuple(range(50, 150))


@pytest.fixture(scope="module")
def engine(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    engines.close()
    with LocalEngine(settings_in(tmp_path_factory.mktemp("conversations"), primed=False, learn="off")) as engine:
        fix_rates(engine)
        yield engine


def ask(
    engine: LocalEngine, prompt: MarkedPrompt | list[int], options: BlendOptions = REPAIR, salt: str = "own"
) -> Completion:
    return engine.generate(prompt, Sampling(max_tokens=8, ignore_eos=True), options, cache_salt=salt)


def extended(prompt: MarkedPrompt | list[int], done: Completion, following: tuple[int, ...] = FOLLOWING) -> list[int]:
    """The next turn's prompt."""
    token_ids = prompt.token_ids if isinstance(prompt, MarkedPrompt) else prompt
    return [*token_ids, *done.token_ids, *following]


def long_plan(seed: int) -> MarkedPrompt:
    return random_plan(seed, chunks=(200, 200, 200))


def test_a_turn_continues_the_blend_before_it(engine: LocalEngine) -> None:
    plan = long_plan(200)
    ingest(engine, plan)
    first = ask(engine, plan)
    assert first.reuse.mode == "blend"
    prompt = extended(plan, first)
    second = ask(engine, prompt)
    assert second.reuse.mode == "continued" and "1 answers before" in second.reuse.reason
    assert second.reuse.local_tokens >= len(plan.token_ids)  # the answer's first block included
    assert 0 < second.reuse.continued_tokens < second.reuse.local_tokens  # the preamble and the first chunk are exact
    third = ask(engine, extended(prompt, second))
    assert third.reuse.mode == "continued" and "2 answers before" in third.reuse.reason
    assert third.reuse.local_tokens > second.reuse.local_tokens
    assert third.reuse.local_tokens + third.reuse.vllm_tokens == third.reuse.prompt_tokens


def test_a_continued_answer_is_that_over_the_blend(engine: LocalEngine) -> None:
    """A turn's prompt, continued, against the same prompt given as the first one's answer."""
    plan = long_plan(201)
    ingest(engine, plan)
    whole = engine.generate(plan, Sampling(max_tokens=40, ignore_eos=True), REPAIR, cache_salt="whole")
    ask(engine, plan)
    continued = engine.generate(
        [*plan.token_ids, *whole.token_ids[:20]], Sampling(max_tokens=20, ignore_eos=True), REPAIR, cache_salt="own"
    )
    assert continued.reuse.mode == "continued"
    assert continued.token_ids == whole.token_ids[20:]


def test_what_a_template_changes_in_an_answer_is_computed_again(engine: LocalEngine) -> None:
    plan = long_plan(202)
    ingest(engine, plan)
    ask(engine, plan)
    stripped = ask(engine, [*plan.token_ids, *FOLLOWING])
    assert stripped.reuse.mode == "continued"
    assert len(plan.token_ids) - 32 < stripped.reuse.local_tokens <= len(plan.token_ids)


@pytest.mark.parametrize(
    ("options", "salt"),
    [
        (BlendOptions(ratio=0.5), "own"),
        (BlendOptions(ratio=0.2, selector="cacheblend"), "own"),
        (REPAIR, "another"),
    ],
)
def test_what_is_not_inherited(engine: LocalEngine, options: BlendOptions, salt: str) -> None:
    plan = long_plan(203)
    ingest(engine, plan)
    prompt = extended(plan, ask(engine, plan))
    other = ask(engine, prompt, options, salt)
    assert other.reuse.mode != "continued" and other.reuse.continued_tokens == 0
    looser = ask(engine, prompt, BlendOptions(ratio=0.1))
    assert looser.reuse.mode == "continued"


def test_an_exact_request_among_turns_is_full_prefill(engine: LocalEngine) -> None:
    plan = long_plan(204)
    tolerance = 20 * noise(engine, plan)
    ingest(engine, plan)
    prompt = extended(plan, ask(engine, plan))
    ask(engine, prompt)
    turn = MarkedPrompt(tuple(prompt), plan.preamble_length, plan.segments)
    expected, _ = answer(engine, turn, OFF, "another")
    found, _ = answer(engine, turn, OFF, "own")
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("prompts", ["next turn", "same passages"])
def test_what_was_blended_is_exact_when_there_was_time(engine: LocalEngine, prompts: str) -> None:
    plan = long_plan(205)
    tolerance = 20 * noise(engine, plan)
    ingest(engine, plan)
    done = ask(engine, plan)
    engine.settle()
    token_ids = extended(plan, done) if prompts == "next turn" else [*plan.token_ids[:-10], *FOLLOWING]
    turn = MarkedPrompt(tuple(token_ids), plan.preamble_length, plan.segments)
    found, exact = answer(engine, turn, REPAIR, "own")
    assert (exact.reuse.mode, exact.reuse.reason) == ("plain", "exact KV in the local prefix cache")
    common = len(plan.token_ids) + len(done.token_ids) if prompts == "next turn" else len(plan.token_ids) - 10
    assert exact.reuse.local_tokens == common // 32 * 32
    expected, _ = answer(engine, turn, OFF)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_the_exact_kv_is_also_an_exact_requests(engine: LocalEngine) -> None:
    plan = long_plan(206)
    tolerance = 20 * noise(engine, plan)
    ingest(engine, plan)
    ask(engine, plan)
    engine.settle()
    found, done = answer(engine, plan, OFF, "own")
    assert done.reuse.local_tokens > 600
    expected, _ = answer(engine, plan, OFF)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    _, other = answer(engine, plan, OFF, "another")
    assert other.reuse.local_tokens == 0


def test_a_request_comes_before_the_next_piece(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered between two pieces; what was computed before it is kept."""
    plan, other = long_plan(208), long_plan(209)
    ingest(engine, plan)
    ingest(engine, other)
    refiner = worker_half()._refiner
    advance, done, between = refiner.advance, [], []

    def advanced() -> int:
        tokens = advance()
        done.append((refiner._token_ids, tokens))
        if len(done) == 2:  # in the engine's thread, so that the request is there when the piece ends
            request = engine._submit(
                other, Sampling(max_tokens=4), REPAIR, "other", lambda _: between.append(len(done))
            )
            assert request.options == REPAIR.model_copy(update={"namespace": "default", "segments": marked(other)})
        return tokens

    monkeypatch.setattr(refiner, "advance", advanced)
    ask(engine, plan)
    engine.settle()
    assert between and set(between) == {2}
    tokens = [count for token_ids, count in done if token_ids == done[0][0]]
    assert tokens == sorted(tokens) and tokens[2] > tokens[1]  # it went on from where it was
    assert ask(engine, [*plan.token_ids, *FOLLOWING]).reuse.reason == "exact KV in the local prefix cache"
    assert (
        ask(engine, [*other.token_ids, *FOLLOWING], salt="other").reuse.reason == "exact KV in the local prefix cache"
    )


def marked(plan: MarkedPrompt) -> tuple[tuple[int, int], ...]:
    return tuple((segment.start, segment.length) for segment in plan.segments)


def test_a_refinement_that_fails_is_given_up(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = long_plan(210)
    ingest(engine, plan)

    def advance() -> int:
        raise MemoryError

    monkeypatch.setattr(worker_half()._refiner, "advance", advance)
    counted: list[tuple[int, Refined]] = []
    stats = connector(engine).scheduler.stats
    monkeypatch.setattr(stats, "refined", lambda *figures: counted.append(figures))
    done = ask(engine, plan)
    engine.settle()
    monkeypatch.undo()
    assert counted[-1] == (0, Refined(failure="MemoryError")) and not any(tokens for tokens, _ in counted)
    assert ask(engine, extended(plan, done)).reuse.mode == "continued"


def test_what_is_exact_already_is_read_and_not_computed_again(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = long_plan(217)
    tolerance = 20 * noise(engine, plan)
    ingest(engine, plan)
    ask(engine, list(plan.token_ids[:400]), OFF)
    engine.settle()
    refiner = worker_half()._refiner
    advance, starts = refiner.advance, []

    def advanced() -> int:
        starts.append(sum(piece.shape[2] for piece in refiner._pieces))
        return advance()

    monkeypatch.setattr(refiner, "advance", advanced)
    assert ask(engine, plan).reuse.mode == "blend"
    engine.settle()
    assert starts and starts[0] >= 384 and not refiner._pieces
    found, done = answer(engine, plan, OFF, "own")
    assert done.reuse.local_tokens > 600
    expected, _ = answer(engine, plan, OFF)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_a_turn_whose_blocks_are_gone_is_blended_again(engine: LocalEngine) -> None:
    plan = long_plan(211)
    ingest(engine, plan)
    done = ask(engine, plan)
    assert engine._loop.engine.reset_prefix_cache()
    prompt = extended(plan, done)
    assert ask(engine, prompt).reuse.mode == "blend"


def test_what_is_gone_when_the_request_is_taken_up_is_chosen_again(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = long_plan(212)
    tolerance = 20 * noise(engine, plan)
    ingest(engine, plan)
    prompt = extended(plan, ask(engine, plan))
    half = connector(engine).scheduler
    add = half.add

    def added(request: Any) -> None:
        add(request)
        assert half._tracked[request.request_id].choice.held.continued is not None
        assert engine._loop.engine.reset_prefix_cache()

    monkeypatch.setattr(half, "add", added)
    turn = MarkedPrompt(tuple(prompt), plan.preamble_length, plan.segments)
    _, done = answer(engine, turn, REPAIR, "own")
    assert done.reuse.mode == "blend" and done.reuse.reused_tokens > 300
    monkeypatch.undo()
    expected, _ = answer(engine, turn, OFF)
    exact, _ = answer(engine, turn, OFF, "own")
    torch.testing.assert_close(exact, expected, atol=tolerance, rtol=0)


def test_exact_kv_that_came_while_a_request_waited_is_taken(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = long_plan(213)
    ingest(engine, plan)
    half = connector(engine).scheduler
    held = half._chooser.prefixes.held
    monkeypatch.setattr(half._chooser.prefixes, "held", lambda request, names: 0)
    add = half.add

    def added(request: Any) -> None:
        add(request)
        assert half._tracked[request.request_id].choice.plan is not None
        monkeypatch.setattr(half._chooser.prefixes, "held", held)

    ask(engine, plan, OFF)
    monkeypatch.setattr(half, "add", added)
    assert ask(engine, plan).reuse.reason == "exact KV in the local prefix cache"


def test_where_blocks_are_short_nothing_is_refined(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = long_plan(214)
    ingest(engine, plan)
    prefixes = connector(engine).scheduler._chooser.prefixes
    reserve = prefixes.reserve
    monkeypatch.setattr(prefixes, "reserve", lambda blocks: reserve(blocks + 10**6))
    done = ask(engine, plan)
    engine.settle()
    assert ask(engine, extended(plan, done)).reuse.mode == "continued"


def test_no_block_is_lost(engine: LocalEngine) -> None:
    pool = connector(engine).scheduler._chooser.prefixes._pool
    free = pool.get_num_free_blocks()
    for seed in (215, 216):
        plan = long_plan(seed)
        ingest(engine, plan)
        done = ask(engine, plan)
        engine.settle()
        ask(engine, extended(plan, done))
    assert pool.get_num_free_blocks() == free


def test_an_answer_that_a_stop_string_ended_is_continued_and_refined(engine: LocalEngine) -> None:
    plan = long_plan(218)
    ingest(engine, plan)
    whole = ask(engine, plan, salt="whole")
    stop = whole.text.split()[4]
    sampling = Sampling(max_tokens=8, stop=(stop,), ignore_eos=True)
    cut = engine.generate(plan, sampling, REPAIR, cache_salt="own")
    assert cut.finish_reason == "stop"
    assert ask(engine, extended(plan, cut)).reuse.mode == "continued"
    engine.settle()
    exact = ask(engine, [*plan.token_ids, *FOLLOWING])
    assert exact.reuse.reason == "exact KV in the local prefix cache"


def test_a_prompt_without_chunks_is_nobodys_business(engine: LocalEngine) -> None:
    preamble, _, rest = parts(long_plan(217))
    done = ask(engine, [*preamble, *rest])
    assert done.reuse.mode == "plain" and not connector(engine).has_pending_push_work()
