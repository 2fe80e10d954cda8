"""TTFT of applications of LlamaIndex and LangChain as their tutorials write them, against the same with plain prefill.

Each application answers questions over five passages drawn from a pool; the retriever gives what it is told. The KV of
the pool is computed behind the text that stands before the passages in the application's prompts, by the integration's
own step. Each question is asked twice, by plain vLLM and by blending, in turn, under salts of their own. An application
that asks the model several times (refine) counts them together. Medians over the questions.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lmcache_rag.bench.text import token_runs
from lmcache_rag.engine.base import Completion, Delta
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError

if TYPE_CHECKING:
    from lmcache_rag.bench.framework_apps import App, Mode

Row = dict[str, Any]

_PASSAGES = 5
_POOL = 8
_ANSWER_TOKENS = 8
_QUESTION = "What does passage {number} say about the with statement?"


class Recorder:
    """An engine whose answers are kept, and whose requests share nothing in the prefix cache with earlier rounds."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._rounds = 0
        self.answers: list[Completion] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def next_round(self) -> None:
        """Forget the answers."""
        self._rounds += 1
        self.answers = []

    def generate(self, prompt: Any, sampling: Sampling | None = None, options: Any = None) -> Completion:
        answer = self._engine.generate(prompt, sampling, options, cache_salt=f"app-{self._rounds}")
        self.answers.append(answer)
        return answer

    def stream(self, prompt: Any, sampling: Sampling | None = None, options: Any = None) -> Iterator[Delta]:
        for delta in self._engine.stream(prompt, sampling, options, cache_salt=f"app-{self._rounds}"):
            if delta.completion is not None:
                self.answers.append(delta.completion)
            yield delta


def bench_frameworks(
    engine: LocalEngine, *, chunk_tokens: int, questions: int, named: str = "", progress: Callable[[str], Any]
) -> list[Row]:
    """The rows that `lmcache-rag bench frameworks` writes.

    Args:
        named: only applications that have this in their name.

    Raises:
        EngineError: a framework or its integration is not installed, or no application has such a name.
    """
    try:
        from lmcache_rag.bench.framework_apps import apps
    except ImportError as error:
        raise EngineError(
            f"A framework is missing ({error}): install the two packages in integrations/ with their extra `test`."
        ) from error
    recorder = Recorder(engine)
    runs = token_runs(engine.tokenizer, _POOL, chunk_tokens)
    pool = [engine.tokenizer.decode(run).strip() for run in runs]  # type: ignore[attr-defined]
    rows = []
    for app in apps(recorder, _ANSWER_TOKENS):
        if named not in f"{app.framework} {app.name}":
            continue
        progress(f"{app.framework}: {app.name}")
        engine.chunk_store().clear()
        app.precompute(pool)
        rows.append(_measured(app, recorder, pool, questions))
    if not rows:
        raise EngineError(f"No application has {named!r} in its name.")
    return rows


def _measured(app: App, recorder: Recorder, pool: Sequence[str], questions: int) -> Row:
    draw = random.Random(0)  # noqa: S311  # to choose passages
    plain_s, blend_s, answers = list[float](), list[float](), list[Completion]()
    for number in range(questions + 1):  # the first warms up and is not counted
        passages = draw.sample(list(pool), _PASSAGES)
        modes: tuple[tuple[Mode, list[float]], ...] = (("off", plain_s), ("blend", blend_s))
        for mode, seconds in modes:
            recorder.next_round()
            app.ask(mode, _QUESTION.format(number=number), passages)
            if number:
                seconds.append(sum(answer.ttft_s for answer in recorder.answers))
                answers += recorder.answers if mode == "blend" else []
    plain, blend = statistics.median(plain_s), statistics.median(blend_s)
    prompt = sum(answer.prompt_tokens for answer in answers)
    known = sum(answer.reuse.reused_tokens + answer.reuse.recomputed_tokens for answer in answers)
    local = sum(answer.reuse.local_tokens for answer in answers)
    foreign = sum(answer.reuse.foreign_tokens for answer in answers)
    return {
        "framework": app.framework,
        "app": app.name,
        "calls": len(answers) / questions,
        "prompt_tokens": round(prompt / len(answers)),
        "ttft_plain_s": round(plain, 4),
        "ttft_s": round(blend, 4),
        "speedup": round(plain / blend, 2),
        "reused_share": round((known + local) / prompt, 3),
        "foreign_share": round(foreign / max(1, known), 3),
        "threads": recorder.threads,
    }
