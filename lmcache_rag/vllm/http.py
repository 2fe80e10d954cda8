"""What vLLM's OpenAI server lacks for us, as a middleware of it: options are checked, and reports reach every answer.

Pure ASGI, so that streams stay streams. Start vLLM with `--middleware lmcache_rag.vllm.http.ReuseMiddleware`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

from pydantic import ValidationError

from lmcache_rag.request import INGEST_HEADER, INGEST_KEY, PARAMS_KEY, BlendOptions, first_problem
from lmcache_rag.vllm.endpoints import PREFIX, Endpoints, RefusedError
from lmcache_rag.vllm.reports import report_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_ANSWERING = ("/v1/completions", "/v1/chat/completions")
_WAITS = 20
_WAIT_S = 0.01
"""A report may come a moment after the answer that a stop string ended."""

_EVENT = b"data: "
_DONE = re.compile(rb"^data: \[DONE\]", re.MULTILINE)
"""A line of its own: an answer may say the same within one."""


class ReuseMiddleware:
    """Around vLLM's server.

    - Options in `kv_transfer_params` that are none are refused with 400 and the field's name, whatever the path.
    - Storing KV takes the ingest key where there is one, and is refused with 403 else, not ignored.
    - Answers have their report also where they are streamed (in a chunk before the last line, for clients that gave
      `kv_transfer_params` or asked for the usage) and where a stop string ended them.
    - `/lmcache-rag/...` is answered here; see `Endpoints`.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._ingest_key = os.environ.get(INGEST_KEY, "")
        self._endpoints = Endpoints()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not (path.startswith(PREFIX) or _may_hold_options(scope)):
            await self._app(scope, receive, send)
            return
        body = await _whole(receive)
        if body is None:
            return
        request = _object(body)
        try:
            if path.startswith(PREFIX):
                found = await self._endpoints.answer(scope, path, request, may_store=self._may_store(scope))
                await _respond(send, 200, found)
                return
            await self._check(request, scope)
        except RefusedError as refusal:
            await _respond(send, refusal.status, _error(refusal))
            return
        reporting = _Reporting(send, request) if path in _ANSWERING else send
        await self._app(scope, _replayed(body, receive), reporting)

    async def _check(self, request: Mapping[str, Any], scope: Scope) -> None:
        """Raises `RefusedError` where what is asked of us is none, or not allowed."""
        for given in _options_in(request):
            try:
                options = BlendOptions(**given)
            except (ValidationError, TypeError) as error:
                problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
                raise RefusedError(
                    400, f"kv_transfer_params.{PARAMS_KEY}.{problem}", f"kv_transfer_params.{PARAMS_KEY}"
                ) from None
            if options.mode == "precompute":
                self._endpoints.check_may_store(scope, may_store=self._may_store(scope))

    def _may_store(self, scope: Scope) -> bool:
        """Whether the client has shown the ingest key, or needs none."""
        if not self._ingest_key:
            return True
        shown = next((value for name, value in scope["headers"] if name.lower() == _HEADER), b"")
        return hmac.compare_digest(shown, self._ingest_key.encode())


_HEADER = INGEST_HEADER.lower().encode()


def _may_hold_options(scope: Scope) -> bool:
    """Whether a request's body may be JSON: many of vLLM's endpoints take `kv_transfer_params`, and uploads none."""
    sort = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"")
    return scope["method"] == "POST" and not sort.lower().startswith(b"multipart/")


def _options_in(request: Mapping[str, Any]) -> Iterator[Any]:
    """What a request says to us: in its own `kv_transfer_params`, or in those of objects in it, such as sampling
    parameters."""
    waiting = [request]
    while waiting:
        each = waiting.pop()
        params = each.get("kv_transfer_params")
        if isinstance(params, dict) and params.get(PARAMS_KEY) is not None:
            yield params[PARAMS_KEY]
        waiting += [value for value in each.values() if isinstance(value, dict)]


class _Reporting:
    """Passes an answer on, and adds its report."""

    def __init__(self, send: Send, request: Mapping[str, Any]) -> None:
        self._send = send
        options = request.get("stream_options")
        wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self._wanted = wants_usage or request.get("kv_transfer_params") is not None
        self._streams = bool(request.get("stream"))
        self._start: Message | None = None
        self._body = b""
        self._first: dict[str, Any] | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._streams:
            self._start = message  # its length may change
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._streams:
            await self._stream(message)
        else:
            await self._whole(message)

    async def _stream(self, message: Message) -> None:
        """Pass a piece of a stream on; before the line that ends it comes the report."""
        body = message.get("body", b"")
        if self._wanted and self._first is None and body.startswith(_EVENT):
            self._first = _object(body[len(_EVENT) :].partition(b"\n")[0])
        done = _DONE.search(body)
        if self._wanted and self._first and done:
            event = await self._report_event(self._first)
            message = {**message, "body": body[: done.start()] + event + body[done.start() :]}
        await self._send(message)

    async def _report_event(self, first: Mapping[str, Any]) -> bytes:
        report = await _soon(str(first.get("id")))
        if report is None:
            return b""
        shared = {name: first[name] for name in ("id", "object", "created", "model") if name in first}
        event = {**shared, "choices": [], "kv_transfer_params": {PARAMS_KEY: report}}
        return _EVENT + json.dumps(event).encode() + b"\n\n"

    async def _whole(self, message: Message) -> None:
        """Collect an answer, and pass it on at its end."""
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        assert self._start is not None
        if self._start["status"] == 200:
            self._body = await _with_report(self._body)
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(self._body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": self._body})


async def _with_report(body: bytes) -> bytes:
    """An answer, with its report where vLLM left it out."""
    answer = _object(body)
    params = answer.get("kv_transfer_params") or {}
    if not answer.get("choices") or PARAMS_KEY in params:
        return body
    report = await _soon(str(answer.get("id")))
    if report is None:
        return body
    return json.dumps({**answer, "kv_transfer_params": {**params, PARAMS_KEY: report}}).encode()


async def _soon(answer_id: str) -> dict[str, Any] | None:
    """An answer's report, which may be on its way; None where it does not come."""
    for _ in range(_WAITS):
        report = report_of(answer_id)
        if report is not None:
            return report
        await asyncio.sleep(_WAIT_S)
    return None


async def _whole(receive: Receive) -> bytes | None:
    """A request's body; None where the client has left."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read, once more, and then what else comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _object(body: bytes) -> dict[str, Any]:
    """A JSON object; an empty one where it is none, which vLLM refuses in its own words."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _error(refusal: RefusedError) -> dict[str, Any]:
    """In OpenAI's form."""
    kind = "BadRequestError" if refusal.status == 400 else "PermissionDeniedError"
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.status}}


async def _respond(send: Send, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
