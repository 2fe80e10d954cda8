"""A running server, as its clients see it: questions over passages in any order, chats of several rounds, and requests
that were recorded. Each is asked of plain vLLM with its prefix cache (`off`) and of lmcache-rag, one after the other,
under salts of their own."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmcache_rag.bench.load import Answer, Row, closed_loop, figures, streamed
from lmcache_rag.bench.text import token_runs
from lmcache_rag.engine.base import Engine
from lmcache_rag.engine.chat import Chat
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import CorpusError
from lmcache_rag.prompt import completion_format
from lmcache_rag.request import BlendOptions, first_problem

_MOST_AT_A_TIME = 1000
"""Of a trace's requests."""

MODES = {"prefix_cache": BlendOptions(mode="off"), "blend": BlendOptions()}


class Recorded(BaseModel):
    """One request of a trace.

    Attributes:
        at_s: when it was sent, in seconds from the first one.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    at_s: float = Field(default=0.0, ge=0.0)
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    max_tokens: int = Field(default=16, ge=1)

    def asked(self) -> str | Chat:
        """As an engine takes it."""
        return Chat(self.messages) if self.messages else str(self.prompt or "")


@dataclass(frozen=True)
class Size:
    """How much is asked.

    Attributes:
        pool: passages that questions and chats draw from.
        rounds: of a chat.
    """

    requests: int
    concurrency: int
    pool: int
    passages: int
    passage_tokens: int
    rounds: int
    answer_tokens: int


def read_trace(path: Path) -> list[Recorded]:
    """Requests, in the order in which they were sent.

    Raises:
        CorpusError: a line is none; it says which.
    """
    read: list[Recorded] = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                read.append(Recorded.model_validate_json(line))
                if not read[-1].asked():
                    raise CorpusError(f"--trace: line {number} of {path} has neither a `prompt` nor `messages`.")
    except ValidationError as error:
        raise CorpusError(f"--trace: line {number} of {path} is no request: {first_problem(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"--trace: {path} cannot be read ({error}).") from error
    if not read:
        raise CorpusError(f"--trace: {path} is empty.")
    return sorted(read, key=lambda each: each.at_s)


def bench_serving(
    engine: Engine, size: Size, trace: Sequence[Recorded], seed: int, progress: Callable[[str], Any]
) -> list[Row]:
    """A row for each workload and mode: that of a trace alone where one is given, else `permuted` and `chat`, whose
    passages the client stores first.

    Raises:
        EngineError: the server does not let this client store, or a request failed.
    """
    if trace:
        _warm_up(engine, trace[0].asked())
        return [_row("trace", mode, *_replayed(engine, trace, mode, progress)) for mode in MODES]
    form = completion_format()
    preamble = form.preamble_ids(engine.tokenizer)
    runs = token_runs(engine.tokenizer, size.pool, size.passage_tokens)
    progress("ingest")
    engine.precompute(preamble, runs).check()
    draw = random.Random(seed)  # noqa: S311
    drawn = [[token for run in draw.sample(runs, size.passages) for token in run] for _ in range(size.requests)]
    questions = [
        form.question_ids(engine.tokenizer, f"What is said about topic {number}?") for number in range(size.requests)
    ]
    sampling = Sampling(max_tokens=size.answer_tokens, ignore_eos=True)
    _warm_up(engine, [*preamble, *drawn[0], *questions[0]])
    rows = []
    for mode, options in MODES.items():
        progress(f"permuted, {mode}")
        salt = uuid.uuid4().hex

        def ask(number: int, options: BlendOptions = options, salt: str = salt) -> list[Answer]:
            prompt = [*preamble, *drawn[number], *questions[number]]
            return [streamed(engine, prompt, sampling, options, salt)]

        rows.append(_row("permuted", mode, *closed_loop(range(size.requests), size.concurrency, ask)))
    for mode, options in MODES.items():
        progress(f"chat, {mode}")
        salt = uuid.uuid4().hex

        def talk(number: int, options: BlendOptions = options, salt: str = salt) -> list[Answer]:
            history, answers = [*preamble, *drawn[number]], []
            for turn in range(size.rounds):
                asked = form.question_ids(engine.tokenizer, f"And what about topic {turn}?")
                answers.append(streamed(engine, [*history, *asked], sampling, options, salt))
                told = engine.tokenizer.encode(answers[-1].completion.text + "\n", add_special_tokens=False)
                history = [*history, *asked, *told]
            return answers

        chats = range(max(1, size.requests // size.rounds))
        rows.append(_row("chat", mode, *closed_loop(chats, size.concurrency, talk)))
    return rows


def _warm_up(engine: Engine, prompt: Any) -> None:
    """Have first-time costs paid before anything is counted, in both modes."""
    for options in MODES.values():
        streamed(engine, prompt, Sampling(max_tokens=2), options, uuid.uuid4().hex)


def _replayed(
    engine: Engine, trace: Sequence[Recorded], mode: str, progress: Callable[[str], Any]
) -> tuple[list[Answer], float]:
    """Send each request when it was sent, whether or not those before it are answered."""
    progress(f"trace, {mode}: {len(trace)} requests in {trace[-1].at_s:.0f} s")
    salt, start = uuid.uuid4().hex, time.perf_counter()

    def ask(request: Recorded) -> list[Answer]:
        time.sleep(max(0.0, request.at_s - (time.perf_counter() - start)))
        return [streamed(engine, request.asked(), Sampling(max_tokens=request.max_tokens), MODES[mode], salt)]

    return closed_loop(trace, min(len(trace), _MOST_AT_A_TIME), ask)


def _row(workload: str, mode: str, done: Sequence[Answer], seconds: float) -> Row:
    reuse = [one.completion.reuse for one in done]
    prompt = sum(one.completion.prompt_tokens for one in done)
    known = sum(each.reused_tokens + each.recomputed_tokens + each.local_tokens for each in reuse)
    return {
        "workload": workload,
        "mode": mode,
        "requests": len(done),
        **figures(done, seconds),
        "known_share": round(known / max(1, prompt), 3),
    }
