"""Throughput and latency under load: many questions over a shared pool of passages, a fixed number at a time.

A closed loop: each of `concurrency` callers asks its next question when its last one is answered. Three modes over the
same questions: full prefill (nothing is shared), vLLM's prefix cache (shared as far as prompts begin alike), and
blending (beside the prefix cache, as users run it).
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_rag.bench.load import Answer, closed_loop, figures, streamed
from lmcache_rag.bench.text import token_runs
from lmcache_rag.engine.base import Engine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError
from lmcache_rag.prompt import MarkedPrompt, completion_format
from lmcache_rag.request import BlendOptions, ReuseReport

Row = dict[str, Any]

_OFF = BlendOptions(mode="off")


def bench_throughput(
    engine: Engine,
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

            def ask(plan: MarkedPrompt, mode: str = mode, shared: str = shared) -> list[Answer]:
                salt = uuid.uuid4().hex if mode == "full" else shared
                return [streamed(engine, plan, sampling, BlendOptions() if mode == "blend" else _OFF, salt)]

            done, seconds = closed_loop(plans, callers, ask)
            rows.append({"mode": mode, "concurrency": callers, **figures(done, seconds)})
            missed = [reuse for reuse in (one.completion.reuse for one in done) if not _is_whole(reuse)]
            if mode == "blend" and missed:
                why = missed[0].reason or missed[0].misses
                raise EngineError(f"{len(missed)} requests were not blended in full ({why}): nothing to measure.")
    return rows


def _is_whole(reuse: ReuseReport) -> bool:
    return reuse.mode == "blend" and not reuse.missed_tokens
