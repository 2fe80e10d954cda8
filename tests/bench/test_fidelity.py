"""The fidelity harness on a tiny model: full prefill by our passes looks like full prefill, plain reuse not."""

from __future__ import annotations

import pytest
import torch

from lmcache_rag.bench.calibrate import calibrate, default_questions
from lmcache_rag.bench.fidelity import Tried, bench_fidelity, ways
from lmcache_rag.bench.questions import Question
from lmcache_rag.engine import LocalEngine, Sampling
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.prompt import PromptFormat
from lmcache_rag.request import BlendOptions
from tests.helpers import OFF, answer, random_plan

FORM = PromptFormat(preamble="w10 w11 w12 w13", chunk=" {text} ", question=" w14 {question} w15")


def text(seed: int, words: int = 60) -> str:
    return " ".join(f"w{token}" for token in random_plan(seed, chunks=(words,)).token_ids[-words:])


QUESTIONS = [
    Question(f"w{20 + number}", "w30 w31 w32", tuple(text(10 * number + k) for k in range(3))) for number in range(3)
]


def test_rows(llama: LocalEngine) -> None:
    tried = ways(["query", "cacheblend", "all"], [0.2])
    rows = bench_fidelity(llama, FORM, QUESTIONS, tried, seed=0, progress=lambda _: None)
    by = {(row["selector"], row["ratio"], row["preamble"]): row for row in rows}
    assert list(by) == [
        ("full", 1.0, True),
        ("none", 0.0, True),
        ("query", 0.2, True),
        ("cacheblend", 0.2, True),
        ("all", 0.2, True),
        ("cacheblend", 0.2, False),
    ]
    assert all(row["n"] == 3 and row["kl_ci95"][0] <= row["kl_mean"] <= row["kl_ci95"][1] for row in rows)
    reuse, repaired, everything = by["none", 0.0, True], by["query", 0.2, True], by["all", 0.2, True]
    assert by["full", 1.0, True]["kl_mean"] == 0.0 and by["full", 1.0, True]["rougeL_vs_full"] == 1.0
    assert everything["kl_mean"] < 1e-6 < reuse["kl_mean"]
    assert everything["top1"] == everything["rougeL_vs_full"] == 1.0
    assert reuse["flops_share"] == 0.0 < repaired["flops_share"] < everything["flops_share"] < 1.0
    assert repaired["recomputed_tokens"] == 36
    assert by["cacheblend", 0.2, False]["recomputed_tokens"] == 36


def test_it_fails_where_nothing_is_reused(llama: LocalEngine) -> None:
    off = Tried(BlendOptions(mode="off"), 0.0)
    with pytest.raises(EngineError, match="Not all was reused"):
        bench_fidelity(llama, FORM, QUESTIONS[:1], [off], seed=0, progress=lambda _: None)


def test_a_forced_answer_is_followed_and_does_not_change_the_distributions(llama: LocalEngine) -> None:
    plan = random_plan(70)
    free, done = answer(llama, plan, OFF, tokens=3)
    forced = (9, *done.token_ids[1:2])
    sampling = Sampling(max_tokens=3, ignore_eos=True, logprobs=-1, forced_token_ids=forced)
    followed = llama.generate(plan, sampling, OFF, cache_salt="forced")
    assert followed.token_ids[:2] == forced
    first = torch.tensor([followed.logprobs[0][token] for token in sorted(followed.logprobs[0])])
    torch.testing.assert_close(first, free[0], atol=1e-5, rtol=0)
    longer = llama.generate([*plan.token_ids, *forced], Sampling(max_tokens=1), OFF, cache_salt="longer")
    assert followed.token_ids[2] == longer.token_ids[0]


def test_calibration_measures_a_curve_down_to_full_prefill(llama: LocalEngine) -> None:
    calibration = calibrate(llama, FORM, QUESTIONS, 1.0, lambda _: None)
    assert calibration.questions == 3 and [ratio for ratio, _ in calibration.points][:2] == [0.0, 0.05]
    assert calibration.points[0][1] > calibration.points[-1][1]
    assert 0.0 < calibration.ratio_for(calibration.points[0][1] / 3) < 1.0
    doubled = calibrate(llama, FORM, QUESTIONS, 2.0, lambda _: None)
    assert doubled.points[0][1] == pytest.approx(2 * calibration.points[0][1], rel=1e-3)


def test_built_in_questions_have_passages_of_their_own() -> None:
    questions = default_questions(12)
    assert len({passage for question in questions for passage in question.passages}) > 30
    assert all(len(set(question.passages)) == 4 for question in questions)
    assert all(any(question.answer in passage for passage in question.passages) for question in questions)


def test_forced_tokens_that_do_not_exist_are_refused(llama: LocalEngine) -> None:
    for token in (-1, 10**9):
        with pytest.raises(PromptError, match="forced_token_ids"):
            llama.generate([5, 6], Sampling(forced_token_ids=(token,)))


def test_plain_reuse_is_asked_once() -> None:
    tried = ways(["none", "query"], [0.1, 0.2])
    assert [(way.options.selector, way.ratio) for way in tried] == [("none", 0.0), ("query", 0.1), ("query", 0.2)]
