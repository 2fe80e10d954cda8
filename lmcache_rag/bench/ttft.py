"""TTFT of one request over several chunks: full prefill, prefix cache, plain reuse, and blending at several ratios.

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
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.prompt import PromptPlan, completion_format
from lmcache_rag.vllm.request import BlendOptions, SelectorName

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
    plan = PromptPlan.assemble(preamble, runs, prompt_format.question_ids(engine.tokenizer, _QUESTION))
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
    times: dict[int, list[float]] = {number: [] for number in range(len(modes))}
    done_as: dict[int, str] = {}
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
            done_as[number] = done.reuse.mode
            if turn:
                times[number].append(done.ttft_s)
    full = statistics.median(times[0])
    rows: list[Row] = [
        {
            "mode": mode,
            "selector": selector,
            "ratio": ratio,
            "prompt_tokens": len(plan.token_ids),
            "ttft_median_s": round(statistics.median(times[number]), 4),
            "speedup_vs_full": round(full / statistics.median(times[number]), 2),
            "done_as": done_as[number],
            "threads": engine.threads,
        }
        for number, (mode, selector, ratio, _) in enumerate(modes)
    ]
    progress("ingest")
    return [*rows, _ingest(engine, preamble, runs, repeat)]


def _ingest(engine: LocalEngine, preamble: list[int], runs: list[list[int]], repeat: int) -> Row:
    """Seconds to compute and store the chunks, against plain vLLM prefill of the same chunks, one request each, with
    the preamble in the prefix cache (as far as it fills whole blocks)."""
    ingest, plain = [], []
    store, scope = engine.store, engine.chunk_store().scope
    for turn in range(repeat + 1):
        store.delete(list(store.list(scope.prefix)))
        engine.precompute(preamble, [runs[0][:32]])  # leaves the preamble stored, as in any ingest but its first chunk
        ingest.append(engine.precompute(preamble, runs).seconds)
        salt = f"ingest-{turn}"
        engine.generate([*preamble, *runs[0][:32]], _ONE_TOKEN, _OFF, cache_salt=salt)
        start = time.perf_counter()
        for run in runs:
            engine.generate([*preamble, *run], _ONE_TOKEN, _OFF, cache_salt=salt)
        plain.append(time.perf_counter() - start)
    seconds, plain_seconds = statistics.median(ingest[1:]), statistics.median(plain[1:])
    return {
        "mode": "ingest",
        "tokens": sum(map(len, runs)),
        "seconds": round(seconds, 4),
        "vs_plain_prefill": round(seconds / plain_seconds, 3),
        "threads": engine.threads,
    }
