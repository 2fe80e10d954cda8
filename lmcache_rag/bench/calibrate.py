"""Measuring a model's calibration: how far its blends are from full prefill at several recompute ratios."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import Any

from lmcache_rag.bench.fidelity import bench_fidelity, ways
from lmcache_rag.bench.questions import Question
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.plan.budget import Calibration, calibration_of
from lmcache_rag.prompt import PromptFormat
from lmcache_rag.request import DEFAULT_SELECTOR

BUILT_IN_MARGIN = 2.0
"""Divergence over the built-in questions is counted so many times: over real ones that take several passages together
(MuSiQue), SmolLM2's was 1.9 to 2.4 times as large."""

_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_PASSAGES, _WORDS, _ANSWER_WORDS = 4, 150, 4


def default_questions(count: int, *, passages: int = _PASSAGES, words: int = _WORDS) -> list[Question]:
    """Questions over passages of Python's own documentation, which every Python installation has. Their answers are a
    few words from one of the passages, as the answers of most data sets are."""
    texts = {name: text.split() for name, text in sorted(topics.items()) if len(text.split()) >= words}
    names = list(texts)
    step = max(1, len(names) // passages)
    draw = random.Random(0)  # noqa: S311
    questions = []
    for number in range(count):
        asked = [texts[names[(number + part * step) % len(names)]][:words] for part in range(passages)]
        chosen, start = draw.choice(asked), draw.randrange(words - _ANSWER_WORDS)
        questions.append(
            Question(
                f"What does the documentation say about {names[number % len(names)]}?",
                " ".join(chosen[start : start + _ANSWER_WORDS]),
                tuple(map(" ".join, asked)),
            )
        )
    return questions


def calibrate(
    engine: LocalEngine,
    prompt: PromptFormat,
    questions: Sequence[Question],
    margin: float,
    progress: Callable[[str], Any],
) -> Calibration:
    """Measure on `questions`, and count divergence `margin` times.

    Raises:
        EngineError: nothing was reused.
    """
    tried = ways([DEFAULT_SELECTOR], _RATIOS)
    rows = bench_fidelity(engine, prompt, questions, tried, seed=0, progress=progress)[1:]
    return calibration_of(((row["ratio"], margin * row["kl_mean"]) for row in rows), len(questions))
