"""TTFT of one request over several chunks: full prefill, prefix cache, plain reuse, and blending at several ratios.

A blend cannot be faster than recomputing its share of the prompt and what vLLM does for a prompt that it has in its
prefix cache: `times_bound` is the distance to that. Chunks touch each other, or are joined by a blank line, as prompt
templates do it: tokens that nobody has stored.

All modes run in one engine with the same threads, in turn, each repeat with a fresh salt, so that nothing is found in
the local prefix cache but in `prefix_cache`, where the whole prompt was seen before. Medians over the repeats.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_rag.bench.text import token_runs
from lmcache_rag.engine.base import Completion
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.prompt import MarkedPrompt, Segment, completion_format
from lmcache_rag.request import BlendOptions, SelectorName

Row = dict[str, Any]

_ONE_TOKEN = Sampling(max_tokens=1, ignore_eos=True)
_OFF = BlendOptions(mode="off")
_QUESTION = "What does the documentation say about the with statement?"
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class _Mode:
    """What one row measures."""

    name: str
    ratio: float
    options: BlendOptions
    prompt: MarkedPrompt
    chunks: str = ""

    @property
    def reuses(self) -> bool:
        return self.options.mode == "blend"

    @property
    def selector(self) -> str:
        return self.options.selector if self.reuses else ""


def bench_ttft(
    engine: LocalEngine,
    *,
    chunks: int,
    chunk_tokens: int,
    ratios: Sequence[float],
    selectors: Sequence[SelectorName],
    repeat: int,
    must_reuse: bool,
    progress: Callable[[str], Any],
) -> list[Row]:
    """The rows that `lmcache-rag bench ttft` writes.

    Raises:
        EngineError: `must_reuse`, and a blended request reused nothing, so that there is nothing to measure.
    """
    prompt_format = completion_format()
    preamble = prompt_format.preamble_ids(engine.tokenizer)
    runs = token_runs(engine.tokenizer, chunks, chunk_tokens)
    question = prompt_format.question_ids(engine.tokenizer, _QUESTION)
    touching = MarkedPrompt.assemble(preamble, runs, question)
    joined = _joined(preamble, runs, question, engine.tokenizer.encode(_BLANK_LINE, add_special_tokens=False))
    engine.precompute(preamble, runs)
    modes = [
        _Mode("full", 1.0, _OFF, touching),
        _Mode("prefix_cache", 0.0, _OFF, touching),
        _Mode("reuse", 0.0, BlendOptions(selector="none", ratio=0.0), touching, "touching"),
        *(
            _Mode("blend", ratio, BlendOptions(selector=selector, ratio=ratio), prompt, between)
            for selector in selectors
            for ratio in ratios
            for between, prompt in (("touching", touching), ("joined", joined))
        ),
    ]
    answers: dict[int, list[Completion]] = {number: [] for number in range(len(modes))}
    salts = (f"bench-{number}" for number in itertools.count())
    for turn in range(repeat + 1):  # the first turn warms up and is not counted
        for number, mode in enumerate(modes):
            progress(f"repeat {turn} of {repeat}: {mode.name} {mode.selector} {mode.ratio or ''} {mode.chunks}")
            salt = next(salts)
            if mode.name == "prefix_cache":
                engine.generate(mode.prompt, _ONE_TOKEN, mode.options, cache_salt=salt)
            done = engine.generate(mode.prompt, _ONE_TOKEN, mode.options, cache_salt=salt)
            if must_reuse and mode.reuses and not done.reuse.reused_tokens:
                raise EngineError(
                    f"Nothing was reused in mode {mode.name} ({done.reuse.reason}), so there is nothing to measure."
                )
            if turn:
                answers[number].append(done)
    full, cached = (statistics.median(done.ttft_s for done in answers[number]) for number in (0, 1))
    rows = [_row(mode, answers[number], full, cached, engine.threads) for number, mode in enumerate(modes)]
    progress("ingest")
    return [*rows, _ingest(engine, preamble, runs, repeat)]


def _joined(
    preamble: Sequence[int], chunks: Sequence[Sequence[int]], question: Sequence[int], separator: Sequence[int]
) -> MarkedPrompt:
    """A prompt with a separator between each chunk and the next."""
    token_ids, segments = list(preamble), []
    for number, chunk in enumerate(chunks):
        token_ids += separator if number else ()
        segments.append(Segment(len(token_ids), len(chunk)))
        token_ids += chunk
    return MarkedPrompt((*token_ids, *question), len(preamble), tuple(segments))


def _row(mode: _Mode, answers: Sequence[Completion], full: float, cached: float, threads: int) -> Row:
    """A mode's row.

    Args:
        full, cached: the TTFT of full prefill, and of a prompt in the prefix cache.
    """
    seconds = statistics.median(done.ttft_s for done in answers)
    bound = mode.ratio * full + cached if mode.reuses else seconds
    return {
        "mode": mode.name,
        "selector": mode.selector,
        "ratio": mode.ratio,
        "chunks": mode.chunks,
        "prompt_tokens": len(mode.prompt.token_ids),
        "ttft_median_s": round(seconds, 4),
        "ttft_min_s": round(min(done.ttft_s for done in answers), 4),
        "speedup_vs_full": round(full / seconds, 2),
        "times_bound": round(seconds / bound, 2),
        "done_as": answers[-1].reuse.mode,
        "phases_ms": _phases(answers),
        "threads": threads,
    }


def _phases(answers: Sequence[Completion]) -> dict[str, int]:
    """Median milliseconds of each phase; those of one answer add up to its TTFT."""
    return {
        phase: round(1000 * statistics.median(done.reuse.phases_s.get(phase, 0.0) for done in answers))
        for phase in answers[0].reuse.phases_s
    }


def _ingest(engine: LocalEngine, preamble: list[int], runs: list[list[int]], repeat: int) -> Row:
    """Seconds to compute and store the chunks, behind the preamble alone and behind preamble and primer as well,
    against plain vLLM prefill of the same chunks, one request each, with the preamble in the prefix cache (as far as
    it fills whole blocks)."""
    ingest, primed, plain = [], [], []
    for turn in range(repeat + 1):
        engine.chunk_store().clear()
        engine.precompute(preamble, [runs[0][:32]])  # leaves preamble and primer known, as in any ingest but its start
        ingest.append(engine.precompute(preamble, runs, primer=()).seconds)
        primed.append(ingest[-1] + engine.precompute(preamble, runs).seconds)
        salt = f"ingest-{turn}"
        engine.generate([*preamble, *runs[0][:32]], _ONE_TOKEN, _OFF, cache_salt=salt)
        start = time.perf_counter()
        for run in runs:
            engine.generate([*preamble, *run], _ONE_TOKEN, _OFF, cache_salt=salt)
        plain.append(time.perf_counter() - start)
    seconds, primed_seconds, plain_seconds = (statistics.median(each[1:]) for each in (ingest, primed, plain))
    return {
        "mode": "ingest",
        "tokens": sum(map(len, runs)),
        "seconds": round(seconds, 4),
        "vs_plain_prefill": round(seconds / plain_seconds, 3),
        "primed_seconds": round(primed_seconds, 4),
        "primed_vs_plain_prefill": round(primed_seconds / plain_seconds, 3),
        "threads": engine.threads,
    }
