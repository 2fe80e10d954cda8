"""Servers that answer instead of an engine in this process. Needs neither vllm nor torch."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from lmcache_rag.engine.attempts import Attempts, NotFoundError
from lmcache_rag.engine.base import Delta, Engine, PrecomputeReport, Prompt
from lmcache_rag.engine.calls import Answer, Call, call_of, precompute_call, report_of
from lmcache_rag.engine.chat import Chat
from lmcache_rag.engine.servers import Server, Servers
from lmcache_rag.engine.settings import RemoteSettings, Sampling
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.learn.primer import default_primer, primer_ids
from lmcache_rag.request import INGEST_HEADER, BlendOptions, ReuseReport

_CONNECT_S = 20.0

_BATCH = 1024
"""Chunks that are asked about at a time."""

_INGESTING = 2
"""Chunks at a time for each server: one is computed while the next is on its way."""


class RemoteEngine(Engine):
    """One or several OpenAI-compatible servers of the same model, such as `lmcache-rag serve` starts.

    A conversation stays with the server that has its KV; a server that fails is left alone for a while, and its
    requests go to another as long as nothing of the answer has been handed on. It can be copied and pickled, and used
    from several threads and event loops.

    Args:
        base_url: of the server or servers; None takes it from the environment.
        fields: further fields of `RemoteSettings`.

    Raises:
        EngineError: no server is named, or the package `openai` is missing. When called: no server answers.
        PromptError: when called: a server refuses the request.
    """

    def __init__(self, base_url: str | Sequence[str] | None = None, **fields: Any) -> None:
        if base_url is not None:
            fields["base_url"] = base_url
        self.settings = RemoteSettings.checked(**fields)
        self._clients = _Clients(self.settings)
        self._servers = Servers(self.settings.base_url)
        self._tokenizer = RemoteTokenizer(self)
        salt = self.settings.cache_salt
        self._salt = None if salt is None else salt.get_secret_value()

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_settings, (self.settings,)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteEngine:
        return _from_settings(self.settings)

    @property
    def tokenizer(self) -> RemoteTokenizer:
        """The model's, at the server."""
        return self._tokenizer

    @property
    def model_name(self) -> str:
        """See `Engine.model_name`."""
        return str(self.settings.model or self._model["id"])

    @property
    def max_model_len(self) -> int:
        return int(self._model["max_model_len"])

    @property
    def scope(self) -> str:
        """See `Engine.scope`."""
        return f"{' '.join(self.settings.base_url)} {self.model_name}"

    @functools.cached_property
    def calls_tools(self) -> bool:
        """Whether the model can choose to call tools, as `lmcache-rag serve` says; of another server it is taken to."""
        try:
            return bool(self.get("/lmcache-rag/status").get("calls_tools", True))
        except NotFoundError:
            return True

    @property
    def is_described(self) -> bool:
        """See `Engine.is_described`."""
        return "_model" in self.__dict__ and "calls_tools" in self.__dict__

    def render(self, chat: Chat) -> str:
        """See `Engine.render`."""
        body: dict[str, Any] = {"messages": chat.turns(), "tools": list(chat.tools) if chat.offers_tools else None}
        if chat.template_kwargs:
            body["chat_template_kwargs"] = dict(chat.template_kwargs)
        token_ids = self.post("/tokenize", body)["tokens"]
        return str(self.post("/detokenize", {"tokens": token_ids})["prompt"])

    def _pieces(
        self,
        prompt: Prompt,
        sampling: Sampling | None,
        options: BlendOptions | None,
        cache_salt: str | None,
        *,
        handed_on: bool,
    ) -> Iterator[Delta]:
        call = self._call(prompt, sampling, options, cache_salt)
        submitted_at = time.perf_counter()
        attempts = Attempts(self._servers, call.text, self.settings.patience_s)
        while True:
            server = attempts.next()
            if not isinstance(server, Server):
                time.sleep(server)
                continue
            answer = Answer(submitted_at)
            with attempts.at(server, answer):
                with self._create(self._clients.sync(server.url), call) as chunks:
                    for chunk in chunks:
                        text = answer.take(chunk)
                        if text:
                            answer.begun = handed_on
                            yield Delta(text)
                completion = answer.completion()
            if attempts.done:
                yield Delta("", completion)
                return

    async def _apieces(
        self,
        prompt: Prompt,
        sampling: Sampling | None,
        options: BlendOptions | None,
        cache_salt: str | None,
        *,
        handed_on: bool,
    ) -> AsyncIterator[Delta]:
        await self.adescribe()
        call = self._call(prompt, sampling, options, cache_salt)
        submitted_at = time.perf_counter()
        attempts = Attempts(self._servers, call.text, self.settings.patience_s)
        while True:
            server = attempts.next()
            if not isinstance(server, Server):
                await asyncio.sleep(server)
                continue
            answer = Answer(submitted_at)
            with attempts.at(server, answer):
                async with await self._create(self._clients.of_loop(server.url), call) as chunks:
                    async for chunk in chunks:
                        text = answer.take(chunk)
                        if text:
                            answer.begun = handed_on
                            yield Delta(text)
                completion = answer.completion()
            if attempts.done:
                yield Delta("", completion)
                return

    def precompute(
        self,
        preamble: Sequence[int],
        chunks: Sequence[Sequence[int]],
        progress: Callable[[int], Any] | None = None,
        *,
        primer: Sequence[int] | None = None,
        namespace: str | None = None,
    ) -> PrecomputeReport:
        """See `Engine.precompute`. The chunks are spread over the servers, which have to let this client store."""
        if primer is None:
            primer = self._default_primer
        report, start = PrecomputeReport(), time.perf_counter()
        lock, missing = threading.Lock(), self._missing(preamble, primer, chunks, namespace)

        def compute(number: int) -> None:
            fits = len(preamble) + len(primer) + len(chunks[number]) < self.max_model_len
            contexts: list[Sequence[int]] = [primer, ()] if len(primer) and fits else [()]
            reports, refusal = list[ReuseReport](), ""
            try:
                if number in missing:
                    reports = [self._precompute(preamble, behind, chunks[number], namespace) for behind in contexts]
            except PromptError as error:
                refusal = str(error)
            with lock:
                report.unprimed += not fits
                report.count(number, reports, refusal)
                if progress is not None:
                    progress(len(chunks[number]))

        with ThreadPoolExecutor(_INGESTING * len(self._servers.all), "lmcache-rag-ingest") as pool:
            try:
                for _ in pool.map(compute, range(len(chunks))):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        report.seconds = time.perf_counter() - start
        return report

    def prefetch(self, chunks: Iterable[Sequence[int]]) -> int:
        """See `Engine.prefetch`: a server's caches are its own affair."""
        return 0

    def own(self, owner: str, chunks: Sequence[Sequence[int]]) -> None:
        """See `Engine.own`."""
        for asked in self._batches(chunks, owner=owner):
            self.post("/lmcache-rag/own", asked)

    def release(self, owner: str, chunks: Sequence[Sequence[int]]) -> None:
        """See `Engine.release`."""
        for asked in self._batches(chunks, owner=owner):
            self.post("/lmcache-rag/release", asked)

    def close(self) -> None:
        """Close the connections."""
        self._clients.close()

    def post(self, path: str, body: Any) -> Any:
        """The answer of one of the servers' own endpoints, such as `/tokenize`.

        Raises:
            EngineError: no server answers, or it refuses.
            PromptError: it refuses what is asked.
        """
        return self._asked(lambda client, root: client.post(f"{root}{path}", body=body, cast_to=object))

    def get(self, path: str) -> Any:
        """See `post`."""
        return self._asked(lambda client, root: client.get(f"{root}{path}", cast_to=object))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @functools.cached_property
    def _model(self) -> Any:
        """The served model, as `/v1/models` describes it."""
        served = self.get("/v1/models")["data"]
        found = [each for each in served if self.settings.model in (None, each["id"])]
        if not found:
            names = ", ".join(each["id"] for each in served)
            raise EngineError(f"The server has no model {self.settings.model!r}: it serves {names}.")
        return found[0]

    @functools.cached_property
    def _default_primer(self) -> list[int]:
        return primer_ids(self._tokenizer, default_primer(), self.max_model_len // 4)

    def _missing(
        self, preamble: Sequence[int], primer: Sequence[int], chunks: Sequence[Sequence[int]], namespace: str | None
    ) -> set[int]:
        """Numbers of the chunks that are not stored."""
        missing: set[int] = set()
        batches = self._batches(chunks, preamble=list(preamble), primer=list(primer), namespace=namespace)
        for first, asked in zip(range(0, len(chunks), _BATCH), batches, strict=True):
            missing.update(first + number for number in self.post("/lmcache-rag/missing", asked)["missing"])
        return missing

    def _batches(self, chunks: Sequence[Sequence[int]], **fields: Any) -> Iterator[dict[str, Any]]:
        """What is asked about chunks, some at a time."""
        fields["cache_salt"] = self._salt
        for first in range(0, len(chunks), _BATCH):
            yield {**fields, "chunks": [list(map(int, chunk)) for chunk in chunks[first : first + _BATCH]]}

    def _call(
        self, prompt: Prompt, sampling: Sampling | None, options: BlendOptions | None, cache_salt: str | None
    ) -> Call:
        if isinstance(prompt, Chat) and prompt.offers_tools:
            prompt.check_callable(calls_tools=self.calls_tools)
        return call_of(prompt, sampling, options, cache_salt or self._salt)

    def _precompute(
        self, preamble: Sequence[int], primer: Sequence[int], chunk: Sequence[int], namespace: str | None
    ) -> ReuseReport:
        """Have one variant of a chunk computed and stored."""
        context = [*preamble, *primer]
        options = BlendOptions(
            mode="precompute",
            segments=((len(context), len(chunk)),),
            primer_tokens=len(primer),
            namespace=namespace,
        )
        call = precompute_call(context, chunk, options, self._salt)
        answer = self._asked(lambda client, _: self._create(client, call))
        return report_of((answer.model_extra or {}).get("kv_transfer_params") or {}, len(context) + len(chunk))

    def _asked(self, ask: Callable[[Any, str], Any]) -> Any:
        """What a server answers that is not streamed."""
        attempts = Attempts(self._servers, "", self.settings.patience_s)
        while True:
            server = attempts.next()
            if not isinstance(server, Server):
                time.sleep(server)
                continue
            with attempts.at(server):
                answer = ask(self._clients.sync(server.url), server.url.removesuffix("/v1"))
            if attempts.done:
                return answer

    def _create(self, client: Any, call: Call) -> Any:
        endpoint = client.chat.completions if call.is_chat else client.completions
        return endpoint.create(model=self.model_name, **call.body)


class RemoteTokenizer:
    """A server's tokenizer. Texts that come again are not asked for again."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine
        self._known = functools.lru_cache(maxsize=256)(self._asked)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return list(self._known(text, add_special_tokens))

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        """The text of token ids, special ones included."""
        return str(self._engine.post("/detokenize", {"tokens": list(token_ids)})["prompt"])

    def apply_chat_template(self, turns: Sequence[dict[str, Any]], **_: Any) -> str:
        """See `Engine.render`."""
        return self._engine.render(Chat(turns))

    def _asked(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        body = {"prompt": text, "add_special_tokens": add_special_tokens}
        return tuple(self._engine.post("/tokenize", body)["tokens"])


class _Clients:
    """OpenAI clients of each server: one for all threads, and one for each event loop, since connections belong to it.
    A fork makes its own.
    """

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._pid = os.getpid()
        self._sync: dict[str, Any] = {}
        self._async: dict[asyncio.AbstractEventLoop, dict[str, Any]] = {}

    def sync(self, url: str) -> Any:
        self._forget_parents()
        if url not in self._sync:
            self._sync[url] = _openai().OpenAI(base_url=url, **self._arguments())
        return self._sync[url]

    def of_loop(self, url: str) -> Any:
        self._forget_parents()
        self._async = {loop: clients for loop, clients in self._async.items() if not loop.is_closed()}
        clients = self._async.setdefault(asyncio.get_running_loop(), {})
        if url not in clients:
            clients[url] = _openai().AsyncOpenAI(base_url=url, **self._arguments())
        return clients[url]

    def close(self) -> None:
        for client in self._sync.values():
            client.close()
        self._sync.clear()
        self._async.clear()

    def _forget_parents(self) -> None:
        if os.getpid() != self._pid:
            self._pid, self._sync, self._async = os.getpid(), {}, {}

    def _arguments(self) -> dict[str, Any]:
        settings = self._settings
        key, ingest_key = settings.api_key, settings.ingest_key
        return {
            "api_key": key.get_secret_value() if key is not None else "none",
            "timeout": _openai().Timeout(settings.timeout_s, connect=min(_CONNECT_S, settings.timeout_s)),
            "max_retries": 0,  # `Attempts` tries again, at other servers too
            "default_headers": {INGEST_HEADER: ingest_key.get_secret_value()} if ingest_key is not None else None,
        }


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise EngineError(f"The package openai is missing ({error}): install lmcache-rag[remote].") from error
    return openai


def _from_settings(settings: RemoteSettings) -> RemoteEngine:
    return RemoteEngine(**{name: getattr(settings, name) for name in RemoteSettings.model_fields})
