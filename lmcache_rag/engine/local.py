"""vLLM in this process: one thread owns the engine and steps it; callers may be many, streaming, and asynchronous."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lmcache_rag.chunk_kv import NO_CONTEXT, KVScope, variant_of
from lmcache_rag.engine.base import Completion, Delta, PrecomputeReport, Prompt
from lmcache_rag.engine.settings import EngineSettings, Sampling
from lmcache_rag.errors import EngineError, LmcacheRagError, PromptError
from lmcache_rag.model import cache_folder, model_fingerprint, resolve_model, tokenizer_fingerprint
from lmcache_rag.prompt import PromptPlan, Tokenizer
from lmcache_rag.store import ChunkStore, DiskStore
from lmcache_rag.vllm.request import BlendOptions, ReuseReport

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.outputs import RequestOutput

_CPU_KV_CACHE_BYTES = 2 << 30
_CPU_BLOCK_TOKENS = 32


class LocalEngine:
    """A vLLM engine with our worker and connector. One at a time in a process; close it before starting another.

    Raises:
        EngineError: vLLM is missing or does not start, or an engine runs in this process already.
        ModelError: the model cannot be found, or its KV cannot be blended.
        StoreError: the store cannot be written to.
    """

    _running: ClassVar[LocalEngine | None] = None
    _start_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        with LocalEngine._start_lock:
            if LocalEngine._running is not None:
                raise EngineError(
                    "An engine runs in this process already, and vLLM can hold only one KV connector: "
                    "close() it first, or use another process."
                )
            LocalEngine._running = self
        try:
            self.model_folder = resolve_model(self.settings.model)
            self.store = DiskStore(self.settings.store)
            self.threads = self.settings.threads or len(os.sched_getaffinity(0))
            self._ids = itertools.count()
            self._inbox: queue.SimpleQueue[_Request | _Abort | None] = queue.SimpleQueue()
            self._requests: dict[str, _Request] = {}
            self._failure: BaseException | None = None
            self._restore: Callable[[], Any] = lambda: None  # what vLLM changes in this process
            started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._serve, args=(started,), name="lmcache-rag-engine", daemon=True)
            self._thread.start()
            _raise_failure(started.get())
        except BaseException:
            LocalEngine._running = None
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def model_fingerprint(self) -> str:
        """Identity of the model's KV; see `lmcache_rag.model.fingerprint`."""
        return self._fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        return tokenizer_fingerprint(self.model_folder)

    @property
    def dtype(self) -> str:
        """The model's compute type."""
        return self._dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Size of one token's uncoded KV in the store."""
        return self._kv_bytes_per_token

    def chunk_store(self) -> ChunkStore:
        """The stored chunks that this engine uses and makes."""
        return ChunkStore(self.store, KVScope(self.settings.namespace, self._fingerprint))

    def precompute(
        self,
        preamble: Sequence[int],
        chunks: Sequence[Sequence[int]],
        progress: Callable[[int], Any] | None = None,
    ) -> PrecomputeReport:
        """See `Engine.precompute`. Raises `PromptError` for a chunk that does not fit behind the preamble."""
        report = PrecomputeReport()
        start = time.perf_counter()
        stored = self.chunk_store()
        variant = variant_of(preamble)
        for number, chunk in enumerate(chunks):
            if not len(chunk):
                raise PromptError(f"Chunk {number} is empty: leave it out.")
            if len(preamble) + len(chunk) >= self.max_model_len:
                raise PromptError(
                    f"Chunk {number} has {len(chunk)} tokens, and with the preamble's {len(preamble)} it does not fit "
                    f"the model's {self.max_model_len}: split the documents into smaller chunks."
                )
            known = self.store.exists(stored.name(chunk, variant))
            if known and (not preamble or self.store.exists(stored.name(preamble, NO_CONTEXT))):
                report.present += 1
            else:
                plan = PromptPlan.assemble(preamble, [chunk], [])
                segments = tuple((segment.start, segment.length) for segment in plan.segments)
                options = BlendOptions(mode="precompute", segments=segments)
                reuse = self.generate(plan.token_ids, Sampling(max_tokens=1), options).reuse
                report.computed += 1
                report.tokens += reuse.stored_tokens
                report.bytes_stored += reuse.bytes_stored
                if reuse.reason:
                    report.errors.append(reuse.reason)
            if progress is not None:
                progress(len(chunk))
        report.seconds = time.perf_counter() - start
        return report

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        options: BlendOptions | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Completion:
        """See `Engine.generate`. Requests with different `cache_salt` share nothing in vLLM's prefix cache."""
        for delta in self.stream(prompt, sampling, options, cache_salt=cache_salt):
            completion = delta.completion
        assert completion is not None
        return completion

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        options: BlendOptions | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Iterator[Delta]:
        """See `Engine.stream`. Leaving the iterator early aborts the request."""
        events: queue.SimpleQueue[Delta | BaseException] = queue.SimpleQueue()
        request = self._submit(prompt, sampling, options, cache_salt, events.put)
        try:
            while True:
                delta = _raised(events.get())
                yield delta
                if delta.completion is not None:
                    return
        finally:
            self._inbox.put(_Abort(request.request_id))

    async def agenerate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        options: BlendOptions | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Completion:
        async for delta in self.astream(prompt, sampling, options, cache_salt=cache_salt):
            completion = delta.completion
        assert completion is not None
        return completion

    async def astream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        options: BlendOptions | None = None,
        *,
        cache_salt: str | None = None,
    ) -> AsyncIterator[Delta]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Delta | BaseException] = asyncio.Queue()

        def deliver(event: Delta | BaseException) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        request = self._submit(prompt, sampling, options, cache_salt, deliver)
        try:
            while True:
                delta = _raised(await events.get())
                yield delta
                if delta.completion is not None:
                    return
        finally:
            self._inbox.put(_Abort(request.request_id))

    def close(self) -> None:
        """Stop the engine and free its memory; running requests fail."""
        if LocalEngine._running is not self:
            return
        self._inbox.put(None)
        self._thread.join()
        LocalEngine._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(
        self,
        prompt: Prompt,
        sampling: Sampling | None,
        options: BlendOptions | None,
        cache_salt: str | None,
        deliver: Callable[[Delta | BaseException], Any],
    ) -> _Request:
        if LocalEngine._running is not self or self._failure is not None:
            raise EngineError("The engine is closed or has failed: start a new one.") from self._failure
        segments = None
        if isinstance(prompt, PromptPlan):
            token_ids = list(prompt.token_ids)
            segments = tuple((segment.start, segment.length) for segment in prompt.segments) or None
        else:
            token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not token_ids:
            raise PromptError("The prompt is empty.")
        if len(token_ids) >= self.max_model_len:
            raise PromptError(
                f"The prompt has {len(token_ids)} tokens, but the model takes {self.max_model_len - 1} at most: "
                "use fewer or shorter passages, or a shorter question."
            )
        options = options or BlendOptions()
        options = options.model_copy(
            update={
                "namespace": options.namespace or self.settings.namespace,
                "segments": options.segments if options.segments is not None else segments,
            }
        )
        request = _Request(str(next(self._ids)), token_ids, sampling or Sampling(), options, cache_salt, deliver)
        self._inbox.put(request)
        return request

    # What follows runs in the engine's thread.

    def _serve(self, started: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            engine = self._start()
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            started.put(_start_failure(error))
            return
        started.put(None)
        try:
            while self._take_commands(engine):
                if engine.has_unfinished_requests():
                    for output in engine.step():
                        self._deliver(engine, output)
            failure: BaseException = EngineError("The engine was closed while the request ran.")
        except Exception as error:  # noqa: BLE001  # raised again by every request
            self._failure = error
            failure = EngineError(f"vLLM has failed ({error}): start a new engine.")
        for request in self._requests.values():
            request.deliver(failure)
        self._requests.clear()
        engine.engine_core.shutdown()
        self._restore()

    def _start(self) -> LLMEngine:
        _quieten()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            import torch
            from vllm import EngineArgs, LLMEngine
            from vllm.config import KVTransferConfig
            from vllm.platforms import current_platform
        except (ImportError, RuntimeError, OSError) as error:
            raise EngineError(
                f"vLLM cannot be imported ({error}): install the extra `cpu` or `cuda`; where torchvision or "
                "torchaudio is named, uninstall it (text models do not need it)."
            ) from error
        on_cpu = current_platform.is_cpu()
        if on_cpu:
            torch.set_num_threads(self.threads)
            self._restore = functools.partial(setattr, torch, "set_num_threads", torch.set_num_threads)
        settings = self.settings
        arguments: dict[str, Any] = {
            "max_model_len": settings.max_model_len,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "kv_cache_memory_bytes": settings.kv_cache_bytes or (_CPU_KV_CACHE_BYTES if on_cpu else None),
            "block_size": settings.block_tokens or (_CPU_BLOCK_TOKENS if on_cpu else None),
        }
        engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(self.model_folder),
                dtype=_compute_dtype(settings.dtype, self.model_folder, on_cpu=on_cpu),
                enforce_eager=on_cpu,
                enable_prefix_caching=settings.prefix_caching,
                max_num_seqs=settings.max_num_seqs,
                max_logprobs=-1,
                use_tqdm_on_load=False,
                seed=settings.seed,
                worker_cls="lmcache_rag.vllm.worker.BlendWorker",
                kv_transfer_config=KVTransferConfig(
                    kv_connector="BlendConnector",
                    kv_connector_module_path="lmcache_rag.vllm.connector",
                    kv_role="kv_both",
                    kv_load_failure_policy="recompute",
                    kv_connector_extra_config={"store": str(settings.store)},
                ),
                **{name: value for name, value in arguments.items() if value is not None},
            )
        )
        from lmcache_rag.vllm.worker import bound_model

        self._tokenizer = engine.get_tokenizer()
        self._max_model_len = int(engine.model_config.max_model_len)
        self._dtype = str(engine.model_config.dtype).removeprefix("torch.")
        self._fingerprint = model_fingerprint(self.model_folder, str(engine.model_config.dtype), cache_folder())
        self._kv_bytes_per_token = bound_model().shape.bytes_per_token
        return engine

    def _take_commands(self, engine: LLMEngine) -> bool:
        """Take all that callers have asked for, waiting where there is nothing else to do; False to stop."""
        wait = not engine.has_unfinished_requests()
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if command is None:
                return False
            if isinstance(command, _Abort):
                if self._requests.pop(command.request_id, None) is not None:
                    engine.abort_request([command.request_id])
            else:
                self._add(engine, command)

    def _add(self, engine: LLMEngine, request: _Request) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

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
                output_kind=RequestOutputKind.DELTA,
                extra_args={"kv_transfer_params": request.options.to_params()},
            )
            request.core_id = engine.add_request(request.request_id, prompt, params)
            self._requests[request.request_id] = request
        except ValueError as error:
            request.deliver(PromptError(f"vLLM refused the request: {error}"))

    def _deliver(self, engine: LLMEngine, output: RequestOutput) -> None:
        request = self._requests.get(output.request_id)
        if request is None:
            return
        piece = output.outputs[0]
        now = time.perf_counter()
        if request.first_token_at is None:
            request.first_token_at = now
        request.text += piece.text
        request.answer_ids.extend(piece.token_ids)
        for choices in piece.logprobs or ():
            request.logprobs.append({token: choice.logprob for token, choice in choices.items()})
        completion = None
        if output.finished:
            del self._requests[output.request_id]
            completion = request.completion(piece.finish_reason or "abort", _report_of(engine, request), now)
        request.deliver(Delta(piece.text, completion))


def engine_of(engine: LocalEngine | None, settings: EngineSettings | None) -> LocalEngine:
    """The engine given, or one started from the settings given.

    Raises:
        EngineError: not exactly one of them is given, or the engine does not start.
    """
    if (engine is None) == (settings is None):
        raise EngineError(
            "Give one of engine= (a running LocalEngine) and settings= (EngineSettings to start one from)."
        )
    return engine if engine is not None else LocalEngine(settings)


@dataclass
class _Request:
    """One request, from submission to its last token."""

    request_id: str
    token_ids: list[int]
    sampling: Sampling
    options: BlendOptions
    cache_salt: str | None
    deliver: Callable[[Delta | BaseException], Any]
    core_id: str = ""
    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    text: str = ""
    answer_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)

    def completion(self, finish_reason: str, reuse: ReuseReport, now: float) -> Completion:
        assert self.first_token_at is not None
        return Completion(
            text=self.text,
            token_ids=tuple(self.answer_ids),
            finish_reason=finish_reason,
            reuse=reuse,
            ttft_s=self.first_token_at - self.submitted_at,
            total_s=now - self.submitted_at,
            prompt_tokens=len(self.token_ids),
            logprobs=tuple(self.logprobs),
        )


@dataclass(frozen=True)
class _Abort:
    """Ends a request, if it still runs."""

    request_id: str


def _raised(event: Delta | BaseException) -> Delta:
    if isinstance(event, BaseException):
        raise event
    return event


def _report_of(engine: LLMEngine, request: _Request) -> ReuseReport:
    """The report, from the connector's scheduler half: a response ended by a stop string does not carry it."""
    connector: Any = engine.engine_core.engine_core.scheduler.connector  # type: ignore[attr-defined]
    return connector.report_of(request.core_id)


def _compute_dtype(dtype: str, model_folder: Path, *, on_cpu: bool) -> str:
    """vLLM's name of the compute type: the model's own, also where that is float32, which vLLM would cut short; and
    float32 on a CPU without native bfloat16, where it is several times faster."""
    if dtype != "auto" or not on_cpu:
        return dtype
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return dtype
    native = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    return "float32" if not native or _stored_dtype(model_folder) == "float32" else dtype


def _stored_dtype(model_folder: Path) -> str:
    config = json.loads((model_folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "")


def _quieten() -> None:
    """Keep vLLM's start-up notes off the user's terminal; errors still show. `VLLM_LOGGING_LEVEL=INFO` shows all."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def _raise_failure(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure


def _start_failure(error: BaseException) -> BaseException:
    """What the caller is told: our own errors as they are, also where vLLM wraps them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LmcacheRagError):
            return cause
        cause = cause.__cause__ or cause.__context__
    failure = EngineError(f"vLLM did not start: {error}")
    failure.__cause__ = error
    return failure
