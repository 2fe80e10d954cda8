"""Throughput and latency under load: many questions over a shared pool of passages, a fixed number at a time.

A closed loop: each of `concurrency` callers asks its next question when its last one is answered. Three modes over the
same questions: full prefill (nothing is shared), vLLM's prefix cache (shared as far as prompts begin alike), and
blending (beside the prefix cache, as users run it).
"""

from __future__ import annotations

import itertools
import queue
import random
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_rag.bench.text import token_runs
from lmcache_rag.engine.base import Completion
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.prompt import MarkedPrompt, completion_format
from lmcache_rag.request import BlendOptions

Row = dict[str, Any]
_Answer = tuple[Completion, list[float]]

_OFF = BlendOptions(mode="off")


def bench_throughput(
    engine: LocalEngine,
    *,
    concurrency: Sequence[int],
    requests: int,
    pool: int,
    passages: int,
    passage_tokens: int,
    answer_tokens: int,
    seed: int,
    progress: Callable[[str], Any],
) -> list[Row]:
    """The rows that `lmcache-rag bench throughput` writes.

    Raises:
        EngineError: a request was not blended, or not from all of its passages, so that there is nothing to measure.
    """
    prompt_format = completion_format()
    preamble = prompt_format.preamble_ids(engine.tokenizer)
    runs = token_runs(engine.tokenizer, pool, passage_tokens)
    progress("ingest")
    engine.precompute(preamble, runs).check()
    draw = random.Random(seed)  # noqa: S311
    plans = [
        MarkedPrompt.assemble(
            preamble,
            draw.sample(runs, passages),
            prompt_format.question_ids(engine.tokenizer, f"What is said about topic {number}?"),
        )
        for number in range(requests)
    ]
    sampling = Sampling(max_tokens=answer_tokens, ignore_eos=True)
    engine.generate(plans[0], sampling, _OFF, cache_salt=uuid.uuid4().hex)  # first-time costs
    rows = []
    for callers in concurrency:
        for mode in ("full", "prefix_cache", "blend"):
            progress(f"{mode}, {callers} at a time")
            shared = uuid.uuid4().hex

            def ask(plan: MarkedPrompt, mode: str = mode, shared: str = shared) -> _Answer:
                salt = uuid.uuid4().hex if mode == "full" else shared
                return _streamed(engine, plan, sampling, BlendOptions() if mode == "blend" else _OFF, salt)

            start = time.perf_counter()
            done = _closed_loop(plans, callers, ask)
            rows.append(_row(mode, callers, done, time.perf_counter() - start))
            missed = [one.reuse for one, _ in done if one.reuse.mode != "blend" or one.reuse.missed_tokens]
            if mode == "blend" and missed:
                why = missed[0].reason or missed[0].misses
                raise EngineError(f"{len(missed)} requests were not blended in full ({why}): nothing to measure.")
    return rows


def _streamed(engine: LocalEngine, plan: MarkedPrompt, sampling: Sampling, options: BlendOptions, salt: str) -> _Answer:
    """The answer, and the seconds between its tokens."""
    came, completion = [], None
    for delta in engine.stream(plan, sampling, options, cache_salt=salt):
        came.append(time.perf_counter())
        completion = delta.completion
    assert completion is not None
    return completion, [after - before for before, after in itertools.pairwise(came)]


def _closed_loop(plans: Sequence[MarkedPrompt], callers: int, ask: Callable[[MarkedPrompt], _Answer]) -> list[_Answer]:
    waiting: queue.SimpleQueue[MarkedPrompt] = queue.SimpleQueue()
    for plan in plans:
        waiting.put(plan)
    done: list[_Answer] = []
    failures: list[BaseException] = []

    def call() -> None:
        while not failures:
            try:
                done.append(ask(waiting.get_nowait()))
            except queue.Empty:
                return
            except Exception as error:  # noqa: BLE001  # raised again by the caller
                failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return done


def _row(mode: str, concurrency: int, done: Sequence[_Answer], seconds: float) -> Row:
    ttft = sorted(one.ttft_s for one, _ in done)
    tpot = [(one.total_s - one.ttft_s) / max(1, len(one.token_ids) - 1) for one, _ in done]
    gaps = sorted(gap for _, own in done for gap in own)
    return {
        "mode": mode,
        "concurrency": concurrency,
        "requests_per_s": round(len(done) / seconds, 3),
        "ttft_p50_s": round(statistics.median(ttft), 3),
        "ttft_p95_s": round(ttft[min(len(ttft) - 1, int(0.95 * len(ttft)))], 3),
        "tpot_p50_s": round(statistics.median(tpot), 4),
        "itl_p99_ms": round(1000 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))], 1),
    }
