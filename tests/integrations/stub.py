"""An engine and a server that answer as they are told, for what has nothing to do with a model."""

from __future__ import annotations

import asyncio
import json
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lmcache_rag.engine import Chat, Completion, Delta, PrecomputeReport, Prompt, Sampling, ToolCall
from lmcache_rag.request import BlendOptions, ReuseReport

Tokens = tuple[int, ...]


class WordTokenizer:
    """A token for each word."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [zlib.crc32(word.encode()) for word in text.split()]


def answer(text: str = "Blue.", *calls: ToolCall, finish_reason: str = "stop") -> Completion:
    return Completion(
        text=text,
        token_ids=(),
        finish_reason="tool_calls" if calls else finish_reason,
        reuse=ReuseReport(mode="blend", prompt_tokens=100, reused_tokens=80, vllm_tokens=20),
        ttft_s=0.5,
        total_s=1.0,
        prompt_tokens=100,
        answer_tokens=7,
        tool_calls=calls,
    )


def call(tool: str, /, **arguments: Any) -> ToolCall:
    return ToolCall("call-1", tool, json.dumps(arguments))


class StubEngine:
    """An engine.

    Attributes:
        answers: the next one is given, and the last one again and again.
        asked: prompt and sampling of each request.
        synchronous, asynchronous: how many were asked in which way.
        stored: chunk -> who owns it.
        computed: all chunks that were computed, in turn.
    """

    is_described: bool = True

    def __init__(self, *answers: Completion, calls_tools: bool = True) -> None:
        self.answers = list(answers) or [answer()]
        self.asked: list[tuple[Prompt, Sampling]] = []
        self.synchronous = self.asynchronous = 0
        self.stored: dict[Tokens, set[str]] = {}
        self.computed: list[Tokens] = []
        self.tokenizer = WordTokenizer()
        self.max_model_len = 4096
        self.model_name = self.scope = "stub"
        self.calls_tools = calls_tools

    async def adescribe(self) -> None:
        return

    def render(self, chat: Chat) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat.turns()) + "<assistant>"

    def generate(self, prompt: Prompt, sampling: Sampling, options: BlendOptions | None = None) -> Completion:
        self.synchronous += 1
        return self._next(prompt, sampling)

    async def agenerate(self, prompt: Prompt, sampling: Sampling, options: BlendOptions | None = None) -> Completion:
        self.asynchronous += 1
        return self._next(prompt, sampling)

    def stream(self, prompt: Prompt, sampling: Sampling, options: BlendOptions | None = None) -> Iterator[Delta]:
        self.synchronous += 1
        yield from self._pieces(self._next(prompt, sampling))

    async def astream(
        self, prompt: Prompt, sampling: Sampling, options: BlendOptions | None = None
    ) -> AsyncIterator[Delta]:
        self.asynchronous += 1
        for piece in self._pieces(self._next(prompt, sampling)):
            yield piece

    def precompute(
        self,
        preamble: Sequence[int],
        chunks: Sequence[Sequence[int]],
        progress: Callable[[int], Any] | None = None,
        *,
        primer: Sequence[int] | None = None,
        namespace: str | None = None,
    ) -> PrecomputeReport:
        report = PrecomputeReport()
        for chunk in map(tuple, chunks):
            if chunk not in self.stored:
                self.computed.append(chunk)
                report.computed += 1
            if progress is not None:
                progress(len(chunk))
        return report

    def prefetch(self, chunks: Iterable[Sequence[int]]) -> int:
        return 0

    def own(self, owner: str, chunks: Sequence[Sequence[int]]) -> None:
        for chunk in map(tuple, chunks):
            self.stored.setdefault(chunk, set()).add(owner)

    def release(self, owner: str, chunks: Sequence[Sequence[int]]) -> None:
        for chunk in map(tuple, chunks):
            self.stored.get(chunk, set()).discard(owner)
            if not self.stored.get(chunk):
                self.stored.pop(chunk, None)

    def close(self) -> None:
        return

    def _next(self, prompt: Prompt, sampling: Sampling) -> Completion:
        self.asked.append((prompt, sampling))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def _pieces(self, completion: Completion) -> Iterator[Delta]:
        """A piece of four characters after another, and the whole."""
        for start in range(0, len(completion.text), 4):
            yield Delta(completion.text[start : start + 4])
        yield Delta("", completion)


class UndescribedEngine(StubEngine):
    """One that does not know its model before it is asked for it.

    Attributes:
        described_by: the thread that asked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_described, self.described_by = False, ""
        del self.model_name, self.scope

    def describe(self) -> None:
        self.is_described, self.described_by = True, threading.current_thread().name

    async def adescribe(self) -> None:
        if not self.is_described:
            await asyncio.to_thread(self.describe)

    async def agenerate(self, *arguments: Any) -> Completion:
        await self.adescribe()
        return await super().agenerate(*arguments)

    def __getattr__(self, name: str) -> str:
        if name not in ("model_name", "scope"):
            raise AttributeError(name)
        assert self.is_described, "an event loop would wait for it"
        return "stub"


class StubServer:
    """A server that takes chunks to be stored.

    Attributes:
        posted: path and body of each request, in turn.
    """

    def __init__(self) -> None:
        self.posted: list[tuple[str, Any]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                return

            def do_GET(self) -> None:
                self._say({"data": [{"id": "some-model", "max_model_len": 4096}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.posted.append((self.path, body))
                self._say(stub.answer(self.path, body))

            def _say(self, answer: Any) -> None:
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: Any) -> Any:
        if path == "/tokenize":
            return {"tokens": WordTokenizer().encode(body["prompt"])}
        if path == "/v1/completions":
            stored = ReuseReport(mode="precompute", stored_tokens=len(body["prompt"])).model_dump()
            choice = {"index": 0, "text": "", "finish_reason": "length"}
            return {"id": "1", "object": "text_completion", "created": 1, "model": "some-model", "choices": [choice],
                    "kv_transfer_params": {"lmcache_rag": stored}}  # fmt: skip
        return {"missing": list(range(len(body["chunks"])))} if path == "/lmcache-rag/missing" else {}

    def bodies(self, path: str) -> list[Any]:
        return [body for posted, body in self.posted if posted == path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
