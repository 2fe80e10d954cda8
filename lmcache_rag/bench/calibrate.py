"""Measuring a model's calibration: how far its blends are from full prefill at several recompute ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import Any

from lmcache_rag.bench.fidelity import bench_fidelity, ways
from lmcache_rag.bench.questions import Question
from lmcache_rag.blend.budget import Calibration, calibration_of
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.prompt import PromptFormat
from lmcache_rag.vllm.request import DEFAULT_SELECTOR, BlendOptions

_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_ANSWER_TOKENS = 12
_PASSAGES, _WORDS = 4, 150


def default_questions(count: int) -> list[Question]:
    """Questions about Python's own documentation, without answers: passages that every Python installation has."""
    texts = {name: text.split() for name, text in sorted(topics.items()) if len(text.split()) >= _WORDS}
    names = list(texts)
    step = len(names) // _PASSAGES
    return [
        Question(
            f"What does the documentation say about {names[number % step]}?",
            "",
            tuple(" ".join(texts[names[(number + part * step) % len(names)]][:_WORDS]) for part in range(_PASSAGES)),
        )
        for number in range(count)
    ]


def calibrate(
    engine: LocalEngine, prompt: PromptFormat, questions: Sequence[Question], progress: Callable[[str], Any]
) -> Calibration:
    """Measure on `questions`; the answers that distributions are compared along are the model's own after full prefill.

    Raises:
        EngineError: nothing was reused.
    """
    answered = []
    sampling = Sampling(max_tokens=_ANSWER_TOKENS, ignore_eos=True)
    for question in questions:
        plan = prompt.plan(engine.tokenizer, question.passages, question.text)
        answer = engine.generate(plan, sampling, BlendOptions(mode="off")).text
        answered.append(Question(question.text, answer, question.passages))
    tried = ways([DEFAULT_SELECTOR], _RATIOS)
    rows = bench_fidelity(engine, prompt, answered, tried, seed=0, progress=progress)[1:]
    return calibration_of(((row["ratio"], row["kl_mean"]) for row in rows), len(questions))
