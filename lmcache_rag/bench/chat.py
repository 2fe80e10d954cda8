"""Conversations and repeated passages, against plain vLLM with its prefix cache.

A conversation is asked turn by turn, each turn first of vLLM without our work (`off`, which has its prefix cache) and
then of the product, under salts of their own, so that neither finds what the other computed. Both have the same
questions and, by forced answers, the same history. After each turn the user reads for a while.
"""

from __future__ import annotations

import random
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_rag.bench.questions import Question
from lmcache_rag.bench.scores import kl_divergence, log_probs
from lmcache_rag.bench.second import SecondEngine
from lmcache_rag.engine.base import Completion
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.prompt import MarkedPrompt, PromptFormat
from lmcache_rag.request import BlendOptions

Row = dict[str, Any]

WORKLOADS = ("same_passages", "growing_chat", "new_passages", "more_passages", "second_engine")
"""`new_passages` has other passages before the history in each turn, `more_passages` some more of them behind it.
`second_engine` is `growing_chat`, each turn of which is asked of the other of two engines on one store."""

STORED = {"new_passages", "more_passages", "second_engine"}
"""These take `conversations="stored"`."""

_MODES = {"prefix_cache": BlendOptions(mode="off"), "blend": BlendOptions()}
_ANSWER_WORDS = 8
_COMPARED_TOKENS = 4
"""The distributions of so many of an answer's tokens are compared."""


@dataclass(frozen=True)
class Turn:
    """What one turn adds, as token ids.

    Attributes:
        passages: those that the prompt begins with in this turn, where each turn has its own.
        answer: what the model is made to answer.
    """

    passages: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


def conversation(
    engine: LocalEngine, form: PromptFormat, questions: Sequence[Question], turns: int, seed: int
) -> list[Turn]:
    """The first turn asks the first question; those that follow ask about a place in its passages, and are answered
    with what stands there. In turn t, the passages are those of question t where each turn has its own."""
    draw, tokenizer = random.Random(seed), engine.tokenizer  # noqa: S311
    made = []
    for number in range(turns):
        own = questions[number % len(questions)]
        text, answer = questions[0].text, questions[0].answer
        if number:
            words = draw.choice(questions[0].passages).split()
            start = draw.randrange(max(1, len(words) - _ANSWER_WORDS - 4))
            text = f"What is said after the words {' '.join(words[start : start + 4])}?"
            answer = " ".join(words[start + 4 : start + 4 + _ANSWER_WORDS])
        made.append(
            Turn(
                tuple(tuple(form.chunk_ids(tokenizer, passage)) for passage in own.passages),
                tuple(form.question_ids(tokenizer, text)),
                tuple(tokenizer.encode(f" {answer}", add_special_tokens=False)),
            )
        )
    return made


def prompts(preamble: Sequence[int], turns: Sequence[Turn], workload: str) -> Iterator[MarkedPrompt]:
    """The prompt of each turn."""
    history: list[int] = []
    said = MarkedPrompt.assemble(preamble, (), ())
    for turn in turns:
        if workload == "more_passages":
            said = said.followed_by((), turn.passages, turn.question)
            yield said
            said = said.followed_by(turn.answer, (), ())
            continue
        passages = turn.passages if workload == "new_passages" else turns[0].passages
        yield MarkedPrompt.assemble(preamble, passages, [*history, *turn.question])
        if workload != "same_passages":
            history += [*turn.question, *turn.answer]


def bench_chat(
    engine: LocalEngine,
    form: PromptFormat,
    conversations: Sequence[Sequence[Turn]],
    *,
    workloads: Sequence[str],
    idle_s: Sequence[float],
    progress: Callable[[str], Any],
    second: SecondEngine | None = None,
) -> list[Row]:
    """The rows that `lmcache-rag bench chat` writes.

    Args:
        second: on the same store, for the workload that takes two engines.
    """
    preamble = form.preamble_ids(engine.tokenizer)
    passages = {passage for turns in conversations for turn in turns for passage in turn.passages}
    progress(f"ingest: {len(passages)} passages")
    engine.precompute(preamble, sorted(passages)).check()
    rows = []
    for workload in workloads:
        for idle in idle_s:
            measured: dict[tuple[int, str], list[tuple[Completion, float]]] = defaultdict(list)
            for number, turns in enumerate(conversations, start=1):
                progress(f"{workload}, {idle:g} s idle, conversation {number} of {len(conversations)}")
                for place, done in _asked(engine, second, preamble, turns, workload, idle):
                    measured[place].append(done)
            rows += [_row(workload, idle, turn, mode, done) for (turn, mode), done in sorted(measured.items())]
    return rows


def _asked(
    engine: LocalEngine,
    second: SecondEngine | None,
    preamble: Sequence[int],
    turns: Sequence[Turn],
    workload: str,
    idle_s: float,
) -> Iterator[tuple[tuple[int, str], tuple[Completion, float]]]:
    """One conversation: (turn, mode), and what came of it with its divergence from exact KV."""
    engine.settle()
    if second is not None:
        second.settle()
    salts = {mode: uuid.uuid4().hex for mode in _MODES}
    for number, (turn, prompt) in enumerate(zip(turns, prompts(preamble, turns, workload), strict=True), start=1):
        forced = Sampling(max_tokens=len(turn.answer), ignore_eos=True, forced_token_ids=turn.answer)
        again = forced.model_copy(update={"logprobs": -1, "max_tokens": min(_COMPARED_TOKENS, len(turn.answer))})
        other = second if second is not None and workload == "second_engine" and number % 2 == 0 else engine
        asked = {"prefix_cache": engine, "blend": other}
        done = {mode: asked[mode].generate(prompt, forced, _MODES[mode], cache_salt=salts[mode]) for mode in _MODES}
        found = {
            mode: log_probs(asked[mode].generate(prompt, again, _MODES[mode], cache_salt=salts[mode]).logprobs)
            for mode in _MODES
        }
        for mode in _MODES:
            divergence = kl_divergence(found["prefix_cache"], found[mode])
            yield (number, mode), (done[mode], float(divergence.mean()))
        time.sleep(idle_s)


def _row(workload: str, idle_s: float, turn: int, mode: str, done: Sequence[tuple[Completion, float]]) -> Row:
    reuse = [completion.reuse for completion, _ in done]
    reused = [report.local_tokens + report.reused_tokens for report in reuse]
    return {
        "workload": workload,
        "idle_s": idle_s,
        "turn": turn,
        "mode": mode,
        "ttft_median_s": round(statistics.median(completion.ttft_s for completion, _ in done), 3),
        "exact": all(report.mode in ("plain", "prefix", "off") for report in reuse),
        "answered_from": sorted({report.mode for report in reuse}),
        "kl_to_full": round(statistics.mean(kl for _, kl in done), 4),
        "reused_tokens": round(statistics.median(reused)),
        "computed_tokens": round(
            statistics.median(report.prompt_tokens - tokens for report, tokens in zip(reuse, reused, strict=True))
        ),
        "n": len(done),
    }
