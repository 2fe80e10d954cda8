"""Which answers count as right, and as having stayed so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_rag.bench.answers import Expected, bench_answers, read_expected
from lmcache_rag.bench.questions import DataError
from lmcache_rag.engine import Completion, Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.request import BlendOptions, ReuseReport

EXAMPLES = Path(__file__).parents[2] / "examples"
TRIED = {"default": BlendOptions(), "r=1": BlendOptions(ratio=1.0)}


class Answers:
    """An engine that answers each question as told: by plain prefill, and by each way of blending."""

    def __init__(self, told: dict[str, tuple[str, str, str]], mode: Any = "blend") -> None:
        self._told = told
        self._mode = mode

    def generate(self, prompt: str, sampling: Sampling, options: BlendOptions, cache_salt: str) -> Completion:
        plain, default, everything = self._told[prompt]
        off = options.mode == "off"
        text = plain if off else everything if options.ratio == 1 else default
        recomputed = 0 if off else 100 if options.ratio == 1 else 20
        return Completion(
            text=text,
            token_ids=(),
            finish_reason="stop",
            reuse=ReuseReport(
                mode="off" if off else self._mode, reused_tokens=100 - recomputed, recomputed_tokens=recomputed
            ),
            ttft_s=2.0 if off else 0.5,
            total_s=3.0,
            prompt_tokens=100,
            answer_tokens=1,
        )


def rows(told: dict[str, tuple[str, str, str]], *, wrong: bool = True, mode: Any = "blend") -> list[dict[str, Any]]:
    corpus: Any = SimpleNamespace(
        prompt=lambda question, found: question,
        search=lambda question, count: [],
        manifest=SimpleNamespace(prompt=SimpleNamespace(stop=("\n",))),
    )
    asked = [Expected(question=question, expected="Blue") for question in told]
    engine: Any = Answers(told, mode)
    return bench_answers(engine, corpus, asked, TRIED, passages=2, wrong=wrong, progress=lambda _: None)


TOLD = {
    "stays": ("It is blue.", "blue", "It is blue."),
    "is lost": ("It is blue.", "It is red.", "It is blue."),
    "is won": ("It is red.", "It is blue.", "It is red."),
    "is wrong": ("It is red.", "It is red.", "It is red."),
}


def test_answers_that_stay_right_and_that_become_right() -> None:
    default, everything = rows(TOLD)
    assert (default["questions"], default["right_plain"]) == (4, 2)
    assert (default["stay_right"], default["become_right"], default["same_text_share"]) == (1, 1, 0.25)
    assert (everything["stay_right"], everything["become_right"], everything["same_text_share"]) == (2, 0, 1.0)
    assert default["stay_right_ci95"][0] < 0.5 < default["stay_right_ci95"][1] < 1
    assert 0 < everything["stay_right_ci95"][0] < 1 == everything["stay_right_ci95"][1]
    assert (default["recompute_share_mean"], default["speedup"]) == (0.2, 4.0)


def test_only_what_plain_prefill_answers_right() -> None:
    default, _ = rows(TOLD, wrong=False)
    assert (default["right_plain"], default["stay_right"], default["become_right"]) == (2, 1, "")
    assert default["same_text_share"] == 0


def test_nothing_to_measure() -> None:
    with pytest.raises(EngineError, match="none of the questions right"):
        rows({"is wrong": TOLD["is wrong"]})
    with pytest.raises(EngineError, match="Not blended: 'stays'"):
        rows(TOLD, mode="plain")


@pytest.mark.parametrize(
    ("text", "problem"), [('[{"question": "q"}]', "expected"), ('[{"question": "q", "expected": " "}]', "0.expected")]
)
def test_questions_that_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "questions.json"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        read_expected(path)


@pytest.mark.parametrize("name", ["questions.json", "handbook_questions.json"])
def test_the_handbook_holds_what_its_questions_expect(name: str) -> None:
    handbook = " ".join(" ".join(path.read_text() for path in (EXAMPLES / "corpus").iterdir()).lower().split())
    questions = read_expected(EXAMPLES / name)
    assert len({question.question for question in questions}) == len(questions)
    for question in questions:
        assert question.expected.lower() in handbook, question
        assert not question.is_met(question.question), question
    assert (
        read_expected(EXAMPLES / name, 3)
        == questions[:3]
        == [Expected(**item) for item in json.loads((EXAMPLES / name).read_text())[:3]]
    )
