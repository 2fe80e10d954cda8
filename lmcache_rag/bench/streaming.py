"""TTFT with a goal, over a store whose bandwidth falls in the middle of a request: what choosing codecs is worth."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from lmcache_rag.bench.scores import kl_divergence, log_probs
from lmcache_rag.bench.text import token_runs
from lmcache_rag.blobs.throttled import PAUSE_S
from lmcache_rag.chunk_kv import key_of
from lmcache_rag.engine.base import Completion
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.prompt import MarkedPrompt, completion_format
from lmcache_rag.request import BlendOptions

Row = dict[str, Any]

_ONE_TOKEN = Sampling(max_tokens=1, ignore_eos=True)
_WITH_LOGPROBS = Sampling(max_tokens=1, ignore_eos=True, logprobs=-1)
_QUESTION = "What does the documentation say about the with statement?"


def prompt_to_stream(engine: LocalEngine, chunks: int, chunk_tokens: int) -> MarkedPrompt:
    """A prompt over chunks of Python's documentation."""
    form = completion_format()
    runs = token_runs(engine.tokenizer, chunks, chunk_tokens)
    return MarkedPrompt.assemble(
        form.preamble_ids(engine.tokenizer), runs, form.question_ids(engine.tokenizer, _QUESTION)
    )


def ingest_stream(engine: LocalEngine, plan: MarkedPrompt) -> int:
    """Store the prompt's chunks; returns the bytes of one of them in the engine's own codec."""
    chunks = [list(plan.token_ids[segment.start : segment.end]) for segment in plan.segments]
    preamble = plan.token_ids[: plan.preamble_length]
    engine.precompute(preamble, chunks, primer=()).check()
    stored = engine.chunk_store()
    return next(iter(stored.variants(key_of(chunks[0])).values())).size_bytes


def bench_streaming(
    engine: LocalEngine,
    plan: MarkedPrompt,
    *,
    goal_s: float,
    ratio: float,
    repeat: int,
    bandwidth: str,
    progress: Callable[[str], Any],
) -> list[Row]:
    """Full prefill, blending in the store's own codec, and blending with the goal, in turn; medians."""
    modes = {
        "full": BlendOptions(mode="off"),
        "fixed": BlendOptions(ratio=ratio),
        "adaptive": BlendOptions(ratio=ratio, ttft_goal_s=goal_s),
    }
    answers: dict[str, list[Completion]] = {mode: [] for mode in modes}
    salts = (f"{bandwidth}-{number}" for number in itertools.count())
    for turn in range(repeat + 1):  # the first turn warms up, and teaches the loader the store's first rate
        for mode, options in modes.items():
            progress(f"{bandwidth}: repeat {turn} of {repeat}, {mode}")
            time.sleep(2 * PAUSE_S)  # the store begins each request at its first rate
            done = engine.generate(plan, _ONE_TOKEN, options, cache_salt=next(salts))
            if turn:
                answers[mode].append(done)
    said = {
        mode: log_probs(engine.generate(plan, _WITH_LOGPROBS, options, cache_salt=next(salts)).logprobs)
        for mode, options in modes.items()
    }
    return [
        {
            "bandwidth": bandwidth,
            "mode": mode,
            "goal_s": goal_s if mode == "adaptive" else "",
            "ttft_median_s": round(statistics.median(done.ttft_s for done in found), 3),
            "loaded_tokens": dict(found[-1].reuse.codecs),
            "computed_tokens": found[-1].reuse.missed_tokens,
            "mb_loaded": round(found[-1].reuse.bytes_loaded / 1e6, 1),
            "kl_first_token": round(float(kl_divergence(said["full"], said[mode])[0]), 4),
        }
        for mode, found in answers.items()
    ]
