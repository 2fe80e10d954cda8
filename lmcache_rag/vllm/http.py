"""What vLLM's OpenAI server lacks for us, as a middleware of it: options are checked, and reports reach every answer.

Pure ASGI, so that streams stay streams. Start vLLM with `--middleware lmcache_rag.vllm.http.ReuseMiddleware`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from pydantic import ValidationError
from starlette._utils import get_route_path

from lmcache_rag.request import INGEST_HEADER, INGEST_KEY, PARAMS_KEY, BlendOptions, first_problem, grant_of
from lmcache_rag.vllm.endpoints import PREFIX, Endpoints, RefusedError, check_request, has_api_key, header_of
from lmcache_rag.vllm.reports import report_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_HEADER = INGEST_HEADER.lower().encode()
_ANSWERING = ("/v1/completions", "/v1/chat/completions")
_TAKING_OPTIONS = frozenset(
    (*_ANSWERING, "/v1/chat/completions/batch", "/v1/responses", "/v1/messages", "/cohere/v2/chat",
     "/inference/v1/generate", "/invocations")
)  # fmt: skip
"""vLLM's endpoints whose requests have `kv_transfer_params`."""

_WAITS = 20
_WAIT_S = 0.01
"""A report may come a moment after the answer that a stop string ended."""

_LONG_BODY, _LONGEST_BODY = 1 << 20, 256 << 20
_EVENT, _DONE = b"data: ", b"data: [DONE]"


class ReuseMiddleware:
    """Around vLLM's server.

    - Options in `kv_transfer_params` that are none are refused with 400 and the field's name, at every endpoint.
    - Storing KV takes the ingest key where there is one, and is refused with 403 else, not ignored.
    - Answers to completions have their report also where they are streamed (in a chunk before the last line, for
      clients that gave `kv_transfer_params` or asked for the usage) and where a stop string ended them.
    - `/lmcache-rag/...` is answered here; see `Endpoints`.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._ingest_key = os.environ.get(INGEST_KEY, "")
        self._endpoints = Endpoints()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = get_route_path(scope) if scope["type"] == "http" else ""
        ours = path.startswith(PREFIX)
        refused = path.startswith("/v1/") and not has_api_key(scope)  # by vLLM
        if not ours and (path not in _TAKING_OPTIONS or refused):
            await self._app(scope, receive, send)
            return
        try:
            if ours:
                check_request(scope, path)
            body = await _whole(receive)
            request = await _parsed(body)
            if ours:
                found = await self._endpoints.answer(scope, path, request, may_store=self._may_store(scope))
                await _respond(send, 200, found)
                return
            if self._check(request, scope):
                body = self._granted(request)
        except RefusedError as refusal:
            await _respond(send, refusal.status, _error(refusal))
            return
        # Reports come with vLLM's statistics; without them nothing is to be waited for.
        are_told = not getattr(scope["app"].state.args, "disable_log_stats", False)
        reporting = _Reporting(send, request) if path in _ANSWERING and are_told else send
        await self._app(scope, _replayed(body, receive), reporting)

    def _check(self, request: Mapping[str, Any], scope: Scope) -> bool:
        """Whether KV is to be stored. Raises `RefusedError` where what is asked of us is none, or not allowed."""
        params = request.get("kv_transfer_params")
        given = params.get(PARAMS_KEY) if isinstance(params, dict) else None
        if given is None:
            return False
        try:
            options = BlendOptions(**given)
        except (ValidationError, TypeError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
            field = f"kv_transfer_params.{PARAMS_KEY}"
            raise RefusedError(400, f"{field}.{problem}", field) from None
        if options.mode == "precompute":
            self._endpoints.check_may_store(scope, may_store=self._may_store(scope))
        return options.mode == "precompute"

    def _granted(self, request: Mapping[str, Any]) -> bytes:
        """The request of a client that may store, as the engine wants to see it."""
        params = request["kv_transfer_params"]
        options = {**params[PARAMS_KEY], "grant": grant_of(self._ingest_key) if self._ingest_key else None}
        return json.dumps({**request, "kv_transfer_params": {**params, PARAMS_KEY: options}}).encode()

    def _may_store(self, scope: Scope) -> bool:
        """Whether the client has shown the server's key, which vLLM asks for under /v1 only, and the ingest key, or
        needs none."""
        if not has_api_key(scope):
            return False
        return not self._ingest_key or hmac.compare_digest(header_of(scope, _HEADER), self._ingest_key.encode())


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
        at = _end_of_events(body)
        if self._wanted and self._first and at is not None:
            message = {**message, "body": body[:at] + await self._report_event(self._first) + body[at:]}
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


def _end_of_events(body: bytes) -> int | None:
    """Where the line begins that ends a stream; None where it is not here. Text of an answer may hold it too, but there
    no line begins."""
    if body.startswith(_DONE):
        return 0
    at = body.find(b"\n\n" + _DONE)
    return None if at < 0 else at + 2


async def _whole(receive: Receive) -> bytes:
    """A request's body. Raises `RefusedError` where it is too long, or the client has left."""
    parts, length = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise RefusedError(400, "The request ended early.")
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > _LONGEST_BODY:
            raise RefusedError(413, f"A request has {_LONGEST_BODY} bytes at most here.")
        if not message.get("more_body"):
            return b"".join(parts)


async def _parsed(body: bytes) -> dict[str, Any]:
    """A request; a long one in a thread, so that others go on meanwhile."""
    return _object(body) if len(body) < _LONG_BODY else await asyncio.to_thread(_object, body)


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
