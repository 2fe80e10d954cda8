"""vLLM in this process, for several callers, streaming and asyncio at once."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Self

from lmcache_rag.blobs.uri import open_store
from lmcache_rag.chunk_kv import key_of, variant_of
from lmcache_rag.codec import coded_bytes
from lmcache_rag.engine.base import Delta, Engine, PrecomputeReport, Prompt, completed
from lmcache_rag.engine.chat import Chat
from lmcache_rag.engine.loop import EngineLoop, Request
from lmcache_rag.engine.settings import EngineSettings, Sampling
from lmcache_rag.engine.start import runs_on_cpu, start_vllm
from lmcache_rag.engine.tools import ToolReader, tool_parser_of
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.learn.codec import CodecLearning, LearnedModel
from lmcache_rag.learn.primer import default_primer, primer_ids
from lmcache_rag.library.chunks import ChunkStore, ChunkStores
from lmcache_rag.library.tables import TableStore
from lmcache_rag.model import resolve_model, tokenizer_fingerprint
from lmcache_rag.process import OwnProcess
from lmcache_rag.prompt import MarkedPrompt, Tokenizer, chat_text, encode
from lmcache_rag.request import BlendOptions, ReuseReport

_MOST_AHEAD = 3
"""So many are asked for behind the one that is waited for: what is stored over a network, or coded beside a GPU,
takes nothing from what is computed meanwhile. On a CPU both are in each other's way."""


@dataclass
class _Asked:
    """A request, what comes of it, and its report when it has ended."""

    request: Request
    events: queue.SimpleQueue[Delta | BaseException]
    reuse: ReuseReport | None = None


class LocalEngine(Engine):
    """A vLLM engine with our worker and connector. One at a time in a process; close it before starting another.

    Attributes:
        codec: the tables of the model's KV codec.

    Raises:
        EngineError: vLLM is missing or does not start, or an engine runs in this process already.
        ModelError: the model cannot be found, or its KV cannot be blended.
        StoreError: the store cannot be written to.
    """

    _running: ClassVar[LocalEngine | None] = None
    _start_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        if LocalEngine._running is not None:
            LocalEngine._running._process.check()
        self._process: OwnProcess = OwnProcess("The engine")
        with LocalEngine._start_lock:
            if LocalEngine._running is not None:
                raise EngineError(
                    "An engine runs in this process already, and vLLM can hold only one KV connector: "
                    "close() it first, or use another process."
                )
            LocalEngine._running = self
        try:
            self.model_folder = resolve_model(self.settings.model)
            self.store = open_store(self.settings.store, self.settings.tiers)
            self.threads = self.settings.threads or len(os.sched_getaffinity(0))
            self._ids = itertools.count()
            self._loop = EngineLoop(functools.partial(start_vllm, self.settings, self.model_folder, self.threads))
        except BaseException:
            LocalEngine._running = None
            raise
        try:
            self._read_properties()
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> NoReturn:
        raise EngineError(
            "An engine in this process cannot be copied or sent to another process: start `lmcache-rag serve` and use "
            "base_url= instead."
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def model_name(self) -> str:
        """See `Engine.model_name`."""
        return self.settings.model

    @property
    def scope(self) -> str:
        """See `Engine.scope`."""
        return f"{self.settings.store} {self.settings.namespace}/{self._fingerprint}"

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
        """What one token's KV takes in the store, about, in all codecs in which it is stored."""
        return coded_bytes(self._shape, (self.settings.codec, *self.settings.extra_codecs))

    @property
    def layers(self) -> int:
        """How many attention layers the model has."""
        return self._shape.layers

    def chunk_store(self, namespace: str | None = None, *, wait: bool = True) -> ChunkStore:
        """The stored chunks that this engine uses and makes, by default in its own namespace, as they are now; over a
        network, if it is not to `wait`, as they were a moment ago.

        Raises:
            StoreError: the store cannot be read.
        """
        chunks = self._chunks.of(namespace or self.settings.namespace)
        (chunks.refresh if wait else chunks.follow)()
        return chunks

    def prefetch(self, chunks: Iterable[Sequence[int]]) -> int:
        """See `Engine.prefetch`."""
        stored = self.chunk_store(wait=False)
        names = []
        for place, chunk in enumerate(chunks):
            forms = stored.variants(key_of(chunk))
            primed = [variant for variant in forms if "-" in variant]
            wanted = [forms[variant].name for variant in (primed if primed and place else forms)]
            names += [each for name in wanted for each in stored.names_for(name)]
        return self.store.prefetch(names)

    def own(self, owner: str, chunks: Sequence[Sequence[int]]) -> None:
        """See `Engine.own`."""
        self.chunk_store().own(owner, map(key_of, chunks))

    def release(self, owner: str, chunks: Sequence[Sequence[int]]) -> None:
        """See `Engine.release`."""
        self.chunk_store().release(owner, map(key_of, chunks))

    def precompute(
        self,
        preamble: Sequence[int],
        chunks: Sequence[Sequence[int]],
        progress: Callable[[int], Any] | None = None,
        *,
        primer: Sequence[int] | None = None,
        namespace: str | None = None,
    ) -> PrecomputeReport:
        """See `Engine.precompute`. Where a chunk does not fit the model behind the primer too, its primed variant is
        left out.
        """
        self._process.check()
        self.codec.ensure(self._tokenizer.decode(list(chunk)) for chunk in chunks)
        report = PrecomputeReport()
        start = time.perf_counter()
        primer = self._primer if primer is None else primer
        ahead = _MOST_AHEAD if self.store.remote or not runs_on_cpu() else 0
        under_way, asked_of = deque[_Asked](), deque[tuple[int, str, list[_Asked]]]()

        def wait(most: int) -> None:
            while len(under_way) > most:
                under_way[0].reuse = completed(self._deltas(under_way[0])).reuse
                under_way.popleft()
            while asked_of and all(each.reuse is not None for each in asked_of[0][2]):
                number, refusal, asked = asked_of.popleft()
                report.count(number, [each.reuse for each in asked if each.reuse is not None], refusal)
                if progress is not None:
                    progress(len(chunks[number]))

        try:
            for number, chunk in enumerate(chunks):
                refusal, asked = self._unfit(preamble, chunk), list[_Asked]()
                fits = len(preamble) + len(primer) + len(chunk) < self.max_model_len
                report.unprimed += not refusal and not fits
                stored = self.chunk_store(namespace)
                for behind in (
                    [] if refusal else self._missing_variants(preamble, chunk, primer if fits else (), stored)
                ):
                    wait(ahead)
                    asked.append(self._ask_to_precompute(preamble, behind, chunk, namespace))
                    under_way.append(asked[-1])
                asked_of.append((number, refusal, asked))
            wait(0)
        finally:
            for each in under_way:
                self._loop.abort(each.request.request_id)
        report.seconds = time.perf_counter() - start
        return report

    def _unfit(self, preamble: Sequence[int], chunk: Sequence[int]) -> str:
        """Why a chunk cannot be computed behind the preamble, or nothing."""
        if not len(chunk):
            return "It is empty: leave it out."
        if len(preamble) + len(chunk) < self.max_model_len:
            return ""
        return (
            f"It has {len(chunk)} tokens, and with the preamble's {len(preamble)} it does not fit the model's "
            f"{self.max_model_len}: split the documents into smaller chunks."
        )

    def _missing_variants(
        self, preamble: Sequence[int], chunk: Sequence[int], primer: Sequence[int], stored: ChunkStore
    ) -> list[Sequence[int]]:
        """The primers behind which the store lacks the chunk's KV; the empty one also where it lacks the preamble's. It
        comes last: what was computed behind the preamble alone is stored as a residual against what is there."""
        missing: list[Sequence[int]] = []
        if len(primer) and stored.missing(chunk, variant_of(preamble, primer)):
            missing.append(primer)
        if stored.lacks_preamble(preamble) or stored.missing(chunk, variant_of(preamble)):
            missing.append(())
        return missing

    def _ask_to_precompute(
        self, preamble: Sequence[int], primer: Sequence[int], chunk: Sequence[int], namespace: str | None
    ) -> _Asked:
        """Have one variant computed and stored, without waiting for it."""
        context = [*preamble, *primer]
        options = BlendOptions(
            mode="precompute",
            segments=((len(context), len(chunk)),),
            primer_tokens=len(primer),
            namespace=namespace,
        )
        return self._ask([*context, *chunk], Sampling(max_tokens=1), options, None)

    def _ask(
        self, prompt: Prompt, sampling: Sampling | None, options: BlendOptions | None, cache_salt: str | None
    ) -> _Asked:
        events = queue.SimpleQueue[Delta | BaseException]()
        return _Asked(self._submit(prompt, sampling, options, cache_salt, events.put), events)

    def _deltas(self, asked: _Asked) -> Iterator[Delta]:
        """The answer piece by piece; it is aborted where that is left early."""
        try:
            while True:
                self._process.check()
                delta = _raised(asked.events.get())
                yield delta
                if delta.completion is not None:
                    return
        finally:
            self._loop.abort(asked.request.request_id)

    def _pieces(
        self,
        prompt: Prompt,
        sampling: Sampling | None,
        options: BlendOptions | None,
        cache_salt: str | None,
        *,
        handed_on: bool,
    ) -> Iterator[Delta]:
        yield from self._deltas(self._ask(prompt, sampling, options, cache_salt))

    async def _apieces(
        self,
        prompt: Prompt,
        sampling: Sampling | None,
        options: BlendOptions | None,
        cache_salt: str | None,
        *,
        handed_on: bool,
    ) -> AsyncIterator[Delta]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Delta | BaseException] = asyncio.Queue()

        def deliver(event: Delta | BaseException) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        request = self._submit(prompt, sampling, options, cache_salt, deliver)
        try:
            while True:
                self._process.check()
                delta = _raised(await events.get())
                yield delta
                if delta.completion is not None:
                    return
        finally:
            self._loop.abort(request.request_id)

    @property
    def calls_tools(self) -> bool:
        """Whether the model can choose to call tools."""
        return self._tool_parser is not None

    def render(self, chat: Chat) -> str:
        """See `Engine.render`."""
        tools = chat.tools if chat.offers_tools else ()
        return chat_text(self.tokenizer, chat.turns(), tools=tools, template_kwargs=chat.template_kwargs)

    def settle(self) -> None:
        """Wait until all requests are answered, and what the engine does while nothing is asked is done: refinement.

        Raises:
            EngineError: the engine is closed, or fails.
        """
        self._loop.settle()

    def close(self) -> None:
        """Stop the engine and free its memory; running requests fail."""
        if LocalEngine._running is not self or not self._process.is_here():
            return
        self._loop.close()
        LocalEngine._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_properties(self) -> None:
        import torch

        from lmcache_rag.vllm.config import fingerprint_of
        from lmcache_rag.vllm.worker import bound_model

        engine = self._loop.engine
        self._tokenizer = engine.get_tokenizer()
        self._tool_parser = self.settings.tool_parser or tool_parser_of(getattr(self._tokenizer, "chat_template", None))
        self._max_model_len = int(engine.model_config.max_model_len)
        self._vocabulary = int(engine.model_config.get_vocab_size())
        self._dtype = str(engine.model_config.dtype).removeprefix("torch.")
        self._fingerprint = fingerprint_of(engine.vllm_config)
        primer = default_primer() if self.settings.primed else ""
        self._primer = primer_ids(self._tokenizer, primer, self._max_model_len // 4)
        model = bound_model()
        self._shape = model.shape
        settings = self.settings
        self._chunks = ChunkStores(self.store, self._fingerprint, settings.codec, extra=settings.extra_codecs)
        self.codec = CodecLearning(
            LearnedModel(
                name=settings.model,
                folder=self.model_folder,
                fingerprint=self._fingerprint,
                tokenizer=self._tokenizer,
                longest=self._max_model_len,
                dtype=torch.float32 if model.device.type == "cpu" else model.shape.dtype,
                device=model.device,
                rotations=[spec.rotation for spec in model.specs],
            ),
            (settings.codec, *settings.extra_codecs),
            TableStore(self.store, self._fingerprint),
        )

    def _check_forced(self, token_ids: Sequence[int]) -> None:
        if token_ids and not self.settings.forced_answers:
            raise PromptError("The engine takes no forced answers: start it with forced_answers=True.")
        if any(not 0 <= token < self._vocabulary for token in token_ids):
            raise PromptError(f"forced_token_ids: token ids are 0 to {self._vocabulary - 1} (got {list(token_ids)}).")

    def _submit(
        self,
        prompt: Prompt,
        sampling: Sampling | None,
        options: BlendOptions | None,
        cache_salt: str | None,
        deliver: Callable[[Delta | BaseException], Any],
    ) -> Request:
        segments, primer, tools = None, None, None
        if isinstance(prompt, MarkedPrompt):
            token_ids, primer = list(prompt.token_ids), prompt.primer
            segments = tuple((segment.start, segment.length) for segment in prompt.segments) or None
        elif isinstance(prompt, Chat):
            token_ids = encode(self.tokenizer, self.render(prompt), add_special_tokens=False)
            tools = ToolReader(prompt, self.tokenizer, self._tool_parser) if prompt.offers_tools else None
        else:
            token_ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not token_ids:
            raise PromptError("The prompt is empty.")
        if len(token_ids) >= self.max_model_len:
            raise PromptError(
                f"The prompt has {len(token_ids)} tokens, but the model takes {self.max_model_len - 1} at most: "
                "use fewer or shorter passages, or a shorter question."
            )
        sampling = sampling or Sampling()
        self._check_forced(sampling.forced_token_ids)
        options = options or BlendOptions()
        options = options.model_copy(
            update={
                "namespace": options.namespace or self.settings.namespace,
                "segments": options.segments if options.segments is not None else segments,
                "primer": options.primer or primer,
            }
        )
        request = Request(str(next(self._ids)), token_ids, sampling, options, cache_salt, deliver, tools)
        self._loop.submit(request)
        return request


def _forget_lock() -> None:
    """Another thread may have held the lock when this process was forked."""
    LocalEngine._start_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


def _raised(event: Delta | BaseException) -> Delta:
    if isinstance(event, BaseException):
        raise event
    return event
