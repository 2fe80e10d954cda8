"""Whether answers stay right: questions about an index's documents, asked of plain prefill and of blends in turn.

Each question has a phrase that a right answer contains. Of the questions that plain prefill answers right it is counted
how many each way of blending answers right too, and of the others, how many it answers right all the same.
"""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lmcache_rag.bench.questions import Text, read_list
from lmcache_rag.bench.scores import share_interval
from lmcache_rag.corpus.corpus import Corpus
from lmcache_rag.engine.base import Completion, Engine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.request import BlendOptions

Row = dict[str, Any]

_OFF = BlendOptions(mode="off")
_ANSWER_TOKENS = 32


class Expected(BaseModel):
    """A question, and the phrase that a right answer contains."""

    model_config = ConfigDict(frozen=True)

    question: Text
    expected: Annotated[Text, Field(pattern=r"\S")]

    def is_met(self, answer: str) -> bool:
        """Whether an answer is right."""
        return self.expected.lower() in answer.lower()


def read_expected(path: Path, limit: int | None = None) -> list[Expected]:
    """The file's first `limit` questions, all by default. Raises `DataError`."""
    return read_list(path, Expected)[:limit]


@dataclass
class _Counts:
    """Of one way of blending."""

    stay: int = 0
    become: int = 0
    same_text: int = 0
    asked: int = 0
    ttft_s: list[float] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


def bench_answers(
    engine: Engine,
    corpus: Corpus,
    questions: Sequence[Expected],
    tried: Mapping[str, BlendOptions],
    *,
    passages: int,
    wrong: bool,
    progress: Callable[[str], Any],
) -> list[Row]:
    """The rows that `lmcache-rag bench answers` writes, one for each way of blending.

    Args:
        tried: the ways, by name.
        passages: in each prompt, as the index retrieves them.
        wrong: whether blends are asked what plain prefill answers wrong, too.

    Raises:
        EngineError: a question was not blended, or plain prefill answers none right, so that nothing is measured.
    """
    sampling = Sampling(max_tokens=_ANSWER_TOKENS, stop=corpus.manifest.prompt.stop)
    plain_s, right = list[float](), 0
    counts = {name: _Counts() for name in tried}
    for number, question in enumerate(questions, start=1):
        progress(f"question {number} of {len(questions)}, {right} right so far")
        prompt = corpus.prompt(question.question, corpus.search(question.question, passages))
        plain = engine.generate(prompt, sampling, _OFF, cache_salt=uuid.uuid4().hex)
        plain_s.append(plain.ttft_s)
        was_right = question.is_met(plain.text)
        right += was_right
        if not was_right and not wrong:
            continue
        for name, options in tried.items():
            blended = engine.generate(prompt, sampling, options, cache_salt=uuid.uuid4().hex)
            _count(counts[name], question, plain, blended, was_right=was_right)
    if not right:
        raise EngineError("Plain prefill answers none of the questions right: take a larger model, or other questions.")
    return [_row(name, counts[name], len(questions), right, plain_s, wrong=wrong) for name in tried]


def _count(counts: _Counts, question: Expected, plain: Completion, blended: Completion, *, was_right: bool) -> None:
    reuse = blended.reuse
    if reuse.mode != "blend":
        raise EngineError(f"Not blended: {question.question!r} ({reuse.reason or reuse.mode}).")
    is_right = question.is_met(blended.text)
    counts.asked += 1
    counts.stay += was_right and is_right
    counts.become += is_right and not was_right
    counts.same_text += blended.text == plain.text
    counts.ttft_s.append(blended.ttft_s)
    counts.speedups.append(plain.ttft_s / blended.ttft_s)
    counts.shares.append(reuse.recomputed_tokens / max(1, reuse.reused_tokens + reuse.recomputed_tokens))


def _row(name: str, counts: _Counts, questions: int, right: int, plain_s: Sequence[float], *, wrong: bool) -> Row:
    low, high = share_interval(counts.stay, right)
    return {
        "setting": name,
        "questions": questions,
        "right_plain": right,
        "stay_right": counts.stay,
        "stay_right_share": round(counts.stay / right, 3),
        "stay_right_ci95": [round(low, 3), round(high, 3)],
        "become_right": counts.become if wrong else "",
        "same_text_share": round(counts.same_text / counts.asked, 3),
        "recompute_share_mean": round(statistics.mean(counts.shares), 3),
        "ttft_plain_s": round(statistics.median(plain_s), 4),
        "ttft_s": round(statistics.median(counts.ttft_s), 4),
        "speedup": round(statistics.median(counts.speedups), 2),
    }
