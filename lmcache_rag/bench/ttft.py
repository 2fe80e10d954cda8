"""TTFT of one request over several chunks: full prefill, prefix cache, plain reuse, and blending at several ratios.

A blend cannot be faster than recomputing its share of the prompt and what vLLM does for a prompt that it has in its
prefix cache: `times_bound` is the distance to that.

All modes run in one engine with the same threads, in turn, each repeat with a fresh salt, so that nothing is found in
the local prefix cache but in `prefix_cache`, where the whole prompt was seen before. Medians over the repeats.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_rag.bench.text import token_runs
from lmcache_rag.engine.base import Completion
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.prompt import MarkedPrompt, completion_format
from lmcache_rag.request import BlendOptions, SelectorName

Row = dict[str, Any]

_ONE_TOKEN = Sampling(max_tokens=1, ignore_eos=True)
_OFF = BlendOptions(mode="off")
_QUESTION = "What does the documentation say about the with statement?"


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
    plan = MarkedPrompt.assemble(preamble, runs, prompt_format.question_ids(engine.tokenizer, _QUESTION))
    engine.precompute(preamble, runs)
    modes: list[tuple[str, str, float, BlendOptions]] = [
        ("full", "", 1.0, _OFF),
        ("prefix_cache", "", 0.0, _OFF),
        ("reuse", "none", 0.0, BlendOptions(selector="none", ratio=0.0)),
        *(
            ("blend", selector, ratio, BlendOptions(selector=selector, ratio=ratio))
            for selector in selectors
            for ratio in ratios
        ),
    ]
    answers: dict[int, list[Completion]] = {number: [] for number in range(len(modes))}
    salts = (f"bench-{number}" for number in itertools.count())
    for turn in range(repeat + 1):  # the first turn warms up and is not counted
        for number, (mode, selector, ratio, options) in enumerate(modes):
            progress(f"repeat {turn} of {repeat}: {mode} {selector} {ratio or ''}")
            salt = next(salts)
            if mode == "prefix_cache":
                engine.generate(plan, _ONE_TOKEN, options, cache_salt=salt)
            done = engine.generate(plan, _ONE_TOKEN, options, cache_salt=salt)
            if must_reuse and mode in ("reuse", "blend") and not done.reuse.reused_tokens:
                raise EngineError(
                    f"Nothing was reused in mode {mode} ({done.reuse.reason}), so there is nothing to measure."
                )
            if turn:
                answers[number].append(done)
    full, cached = (statistics.median(done.ttft_s for done in answers[number]) for number in (0, 1))
    rows = []
    for number, (mode, selector, ratio, _) in enumerate(modes):
        seconds = statistics.median(done.ttft_s for done in answers[number])
        bound = ratio * full + cached if mode in ("reuse", "blend") else seconds
        rows.append(
            {
                "mode": mode,
                "selector": selector,
                "ratio": ratio,
                "prompt_tokens": len(plan.token_ids),
                "ttft_median_s": round(seconds, 4),
                "speedup_vs_full": round(full / seconds, 2),
                "times_bound": round(seconds / bound, 2),
                "done_as": answers[number][-1].reuse.mode,
                "phases_ms": _phases(answers[number]),
                "threads": engine.threads,
            }
        )
    progress("ingest")
    return [*rows, _ingest(engine, preamble, runs, repeat)]


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
    store, scope = engine.store, engine.chunk_store().scope
    for turn in range(repeat + 1):
        store.delete(list(store.list(scope.prefix)))
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
