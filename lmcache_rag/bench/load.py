"""Asking many questions at a time, and what came of it."""

from __future__ import annotations

import itertools
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lmcache_rag.engine.base import Completion, Engine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.request import BlendOptions

Row = dict[str, Any]
_Asked = TypeVar("_Asked")


@dataclass(frozen=True)
class Answer:
    """An answer that was streamed.

    Attributes:
        gaps_s: seconds between its pieces, each a token or more.
    """

    completion: Completion
    gaps_s: tuple[float, ...]


def streamed(engine: Engine, prompt: Any, sampling: Sampling, options: BlendOptions, salt: str) -> Answer:
    """Ask, and wait for the whole answer."""
    came, completion = [], None
    for delta in engine.stream(prompt, sampling, options, cache_salt=salt):
        came.append(time.perf_counter())
        completion = delta.completion
    assert completion is not None
    return Answer(completion, tuple(after - before for before, after in itertools.pairwise(came)))


def closed_loop(
    asked: Sequence[_Asked], callers: int, ask: Callable[[_Asked], Sequence[Answer]]
) -> tuple[list[Answer], float]:
    """Have so many callers ask, each its next question when its last one is answered; the answers, and the seconds that
    all of it took.

    Raises:
        Exception: the first that a question raised; no further ones are asked then.
    """
    waiting: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
    for each in asked:
        waiting.put(each)
    done: list[Answer] = []
    failures: list[BaseException] = []

    def call() -> None:
        while not failures:
            try:
                done.extend(ask(waiting.get_nowait()))
            except queue.Empty:
                return
            except Exception as error:  # noqa: BLE001  # raised again by the caller
                failures.append(error)

    start = time.perf_counter()
    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return done, time.perf_counter() - start


def figures(done: Sequence[Answer], seconds: float) -> Row:
    """Requests per second, and percentiles of TTFT, of seconds per further token, and of gaps in streams."""
    ttft = sorted(one.completion.ttft_s for one in done)
    tpot = [(one.completion.total_s - one.completion.ttft_s) / max(1, one.completion.answer_tokens - 1) for one in done]
    gaps = sorted(gap for one in done for gap in one.gaps_s) or [0.0]
    return {
        "requests_per_s": round(len(done) / seconds, 3),
        "ttft_p50_s": round(statistics.median(ttft), 3),
        "ttft_p95_s": round(_quantile(ttft, 0.95), 3),
        "tpot_p50_s": round(statistics.median(tpot), 4),
        "itl_p99_ms": round(1000 * _quantile(gaps, 0.99), 1),
    }


def _quantile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]
