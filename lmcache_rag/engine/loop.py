"""The thread that owns a vLLM engine: takes requests and aborts, steps the engine, and hands out what it generates."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcache_rag.engine.base import Completion, Delta
from lmcache_rag.engine.settings import Sampling
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.process import OwnProcess
from lmcache_rag.request import BlendOptions, ReuseReport

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import StructuredOutputsParams

    from lmcache_rag.engine.tools import ToolReader


@dataclass
class Request:
    """One request, from submission to its last token.

    Attributes:
        tools: reads the answer where it may be a call.
        deliver: called in the engine's thread with each piece of the answer, or with an exception that ends it.
        submitted_at, added_at, first_token_at: `time.perf_counter` at submission, when vLLM got it, at its first token.
    """

    request_id: str
    token_ids: list[int]
    sampling: Sampling
    options: BlendOptions
    cache_salt: str | None
    deliver: Callable[[Delta | BaseException], Any]
    tools: ToolReader | None = None
    core_id: str = ""
    submitted_at: float = field(default_factory=time.perf_counter)
    added_at: float | None = None
    first_token_at: float | None = None
    text: str = ""
    answer_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)

    def take(self, output: RequestOutput, now: float) -> str:
        """Add what a step generated; returns the new text for the user."""
        piece = output.outputs[0]
        if self.first_token_at is None:
            self.first_token_at = now
        self.text += piece.text
        self.answer_ids.extend(piece.token_ids)
        for choices in piece.logprobs or ():
            self.logprobs.append({token: choice.logprob for token, choice in choices.items()})
        return piece.text if self.tools is None else self.tools.shown(piece.text, list(piece.token_ids))

    def completion(self, finish_reason: str, reuse: ReuseReport, now: float) -> Completion:
        assert self.added_at is not None
        assert self.first_token_at is not None
        ttft_s, phases_s = self.first_token_at - self.submitted_at, reuse.phases_s
        phases_s["queue"] = phases_s.get("queue", 0.0) + self.added_at - self.submitted_at
        phases_s["vllm"] = max(0.0, ttft_s - sum(phases_s.values()))
        text, calls = (self.text, ()) if self.tools is None else self.tools.finish()
        return Completion(
            text=text,
            token_ids=tuple(self.answer_ids),
            finish_reason="tool_calls" if calls else finish_reason,
            reuse=reuse,
            ttft_s=ttft_s,
            total_s=now - self.submitted_at,
            prompt_tokens=len(self.token_ids),
            answer_tokens=len(self.answer_ids),
            logprobs=tuple(self.logprobs),
            tool_calls=calls,
        )


@dataclass(frozen=True)
class _Abort:
    """Ends a request, if it still runs."""

    request_id: str


@dataclass(frozen=True)
class _Settle:
    """Asks to be told when there is nothing left to do: None, or an exception where the engine has ended."""

    tell: Callable[[BaseException | None], Any]


class EngineLoop:
    """Starts an engine in a thread of its own and serves it until `close`.

    Args:
        start: makes the engine; called in the thread.

    Raises:
        BaseException: whatever `start` raises.
    """

    def __init__(self, start: Callable[[], LLMEngine]) -> None:
        self._start = start
        self._engine: LLMEngine | None = None
        self._inbox: queue.SimpleQueue[Request | _Abort | _Settle | None] = queue.SimpleQueue()
        self._requests: dict[str, Request] = {}
        self._settling: list[_Settle] = []
        self._process = OwnProcess("The engine")
        self._lock = threading.Lock()
        self._ended: BaseException | None = None  # why requests are no longer taken; guarded by the lock
        started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(started,), name="lmcache-rag-engine", daemon=True)
        self._thread.start()
        try:
            failure = started.get()
        except BaseException:  # Ctrl-C: the engine is still starting, and must be gone before another may start
            self.close()
            raise
        if failure is not None:
            self._thread.join()
            raise failure

    @property
    def engine(self) -> LLMEngine:
        """The engine; only to be read from other threads."""
        assert self._engine is not None
        return self._engine

    def submit(self, request: Request) -> None:
        """Take a request. Raises `EngineError` where the engine is closed, has failed, or is another process'."""
        self._put(request)

    def settle(self) -> None:
        """Wait until all is answered, and all is done that the engine does while nothing is asked. Raises
        `EngineError` where the engine is closed, fails, or is another process'."""
        told: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._put(_Settle(told.put))
        failure = told.get()
        if failure is not None:
            raise failure

    def _put(self, command: Request | _Settle) -> None:
        self._process.check()
        with self._lock:
            if self._ended is not None:
                raise EngineError("The engine is closed or has failed: start a new one.") from self._ended
            self._inbox.put(command)

    def abort(self, request_id: str) -> None:
        """End a request, if it still runs."""
        if self._process.is_here():
            self._inbox.put(_Abort(request_id))

    def close(self) -> None:
        """End the engine and wait for it; requests under way fail. A fork has nothing to end."""
        if self._process.is_here():
            self._inbox.put(None)
            self._thread.join()

    def _run(self, started: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            engine = self._engine = self._start()
        except BaseException as error:  # noqa: BLE001  # raised again in the thread that waits for the start
            self._end(error)
            started.put(error)
            return
        started.put(None)
        failure: BaseException = EngineError("The engine was closed while the request ran.")
        try:
            while self._take_commands(engine):
                if _has_work(engine):
                    for output in engine.step():
                        self._deliver(engine, output)
                else:
                    self._tell_settled(None)
        except Exception as error:  # noqa: BLE001  # raised again by every request
            failure = EngineError(f"vLLM has failed ({error}): start a new engine.")
            failure.__cause__ = error
        finally:
            self._end(failure)
            self._engine = None
            engine.engine_core.shutdown()

    def _end(self, failure: BaseException) -> None:
        """Fail all requests, those still in the inbox too, and take no more."""
        with self._lock:
            self._ended = failure
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Request):
                self._requests[command.request_id] = command
            elif isinstance(command, _Settle):
                self._settling.append(command)
        self._tell_settled(failure)
        for request in self._requests.values():
            _hand_over(request, failure)
        self._requests.clear()

    def _tell_settled(self, failure: BaseException | None) -> None:
        for waiting in self._settling:
            waiting.tell(failure)
        self._settling.clear()

    def _take_commands(self, engine: LLMEngine) -> bool:
        """Take all that callers have asked for, waiting where there is nothing else to do; False to stop."""
        wait = not _has_work(engine) and not self._settling
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if command is None:
                return False
            if isinstance(command, Request):
                self._add(engine, command)
            elif isinstance(command, _Settle):
                self._settling.append(command)
            elif self._requests.pop(command.request_id, None) is not None:
                engine.abort_request([command.request_id])

    def _add(self, engine: LLMEngine, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        from lmcache_rag.vllm.forced import FORCED_KEY

        self._requests[request.request_id] = request
        request.added_at = time.perf_counter()
        sampling = request.sampling
        prompt = TokensPrompt(prompt_token_ids=request.token_ids)
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        try:
            params = SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop=list(sampling.stop),
                seed=sampling.seed,
                ignore_eos=sampling.ignore_eos,
                logprobs=sampling.logprobs,
                detokenize=not sampling.forced_token_ids,
                skip_special_tokens=request.tools is None,  # some models write calls with them
                structured_outputs=_structure(request),
                output_kind=RequestOutputKind.DELTA,
                extra_args={
                    "kv_transfer_params": request.options.to_params(),
                    FORCED_KEY: list(sampling.forced_token_ids),
                },
            )
            request.core_id = engine.add_request(request.request_id, prompt, params)
        except Exception as error:  # noqa: BLE001  # vLLM's own kinds are not all ValueErrors; nothing has begun
            del self._requests[request.request_id]
            _hand_over(request, PromptError(f"vLLM refused the request: {error}"))

    def _deliver(self, engine: LLMEngine, output: RequestOutput) -> None:
        request = self._requests.get(output.request_id)
        if request is None:
            return
        now = time.perf_counter()
        completion = None
        if output.finished:
            del self._requests[output.request_id]
        try:
            text = request.take(output, now)
            if output.finished:
                reason = output.outputs[0].finish_reason or "abort"
                completion = request.completion(reason, _report_of(engine, request), now)
        except Exception as error:  # noqa: BLE001  # a parser's, of what the model wrote: nobody else's misfortune
            _hand_over(request, EngineError(f"The answer cannot be read ({type(error).__name__}: {error})."))
            self.abort(request.request_id)
            return
        if not _hand_over(request, Delta(text, completion)):
            self.abort(request.request_id)


def _hand_over(request: Request, event: Delta | BaseException) -> bool:
    """Deliver; False where nobody is there any more (an event loop that was closed)."""
    try:
        request.deliver(event)
    except RuntimeError:
        return False
    return True


def _structure(request: Request) -> StructuredOutputsParams | None:
    """What the answer has to follow: a call where one is forced, else what is asked for."""
    from vllm.sampling_params import StructuredOutputsParams

    structure = dict(request.sampling.structure)
    forced = request.tools.json_schema if request.tools is not None else None
    if forced is not None:
        structure = {"json_schema": forced}
    if "json_schema" in structure:
        structure["json"] = structure.pop("json_schema")
    if "choice" in structure:
        structure["choice"] = list(structure["choice"])
    return StructuredOutputsParams(**structure) if structure else None


def _has_work(engine: LLMEngine) -> bool:
    """Whether the engine is to be stepped: it has requests, some that ended have blocks that are still to be freed, or
    its connector has something to do while nothing is asked."""
    return engine.has_unfinished_requests() or _scheduler_of(engine).has_requests()


def _scheduler_of(engine: LLMEngine) -> Any:
    return engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]


def _report_of(engine: LLMEngine, request: Request) -> ReuseReport:
    """The report, from the connector's scheduler half: a response ended by a stop string does not carry it."""
    report: ReuseReport = _scheduler_of(engine).connector.report_of(request.core_id)
    return report
