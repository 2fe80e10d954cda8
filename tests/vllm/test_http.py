"""The middleware around vLLM's server, around applications of our own."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_rag.vllm import http, reports
from lmcache_rag.vllm.http import ReuseMiddleware

ASKED = {"stream": True, "stream_options": {"include_usage": True}}


def called(
    app: Any,
    body: Any,
    *,
    path: str = "/v1/completions",
    keys: tuple[str, ...] = (),
    disable_log_stats: bool = False,
    **headers: str,
) -> Any:
    """Status and body of what the middleware answers around an application."""
    sent: list[dict[str, Any]] = []
    state = SimpleNamespace(args=SimpleNamespace(api_key=list(keys), disable_log_stats=disable_log_stats))
    scope = {
        "type": "http", "method": "POST", "path": path, "root_path": "", "app": SimpleNamespace(state=state),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ReuseMiddleware(app)(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def streaming(*pieces: bytes) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": piece is not pieces[-1]})

    return app


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    reports.note({"cmpl-known-0-12345678": {"mode": "blend"}})
    monkeypatch.setattr(http, "_WAIT_S", 0.0)


def test_where_no_reports_come_none_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(_: float) -> None:
        raise AssertionError("an answer waits")

    monkeypatch.setattr(http.asyncio, "sleep", waiting)
    stream = b'data: {"id": "cmpl-unknown", "choices": []}\n\ndata: [DONE]\n\n'
    assert called(streaming(stream), ASKED, disable_log_stats=True)[1] == stream
    answer = b'{"id": "cmpl-unknown", "choices": [{"text": "x"}]}'
    assert called(streaming(answer), {"kv_transfer_params": {}}, disable_log_stats=True)[1] == answer


@pytest.mark.parametrize("separate", [True, False])
def test_a_text_that_looks_like_the_end_of_a_stream_is_none(separate: bool) -> None:
    first = b'data: {"id": "cmpl-known", "choices": [{"text": "so it ends: data: [DONE]"}]}\n\n'
    pieces = (first, b"data: [DONE]\n\n") if separate else (first + b"data: [DONE]\n\n",)
    _, body = called(streaming(*pieces), ASKED)
    events = body.split(b"\n\n")
    assert events[0] + b"\n\n" == first
    assert json.loads(events[1].removeprefix(b"data: "))["kv_transfer_params"] == {"lmcache_rag": {"mode": "blend"}}
    assert events[2] == b"data: [DONE]"


def test_an_answer_without_a_report_is_passed_on_as_it_is() -> None:
    pieces = (b'data: {"id": "cmpl-unknown", "choices": []}\n\n', b"data: [DONE]\n\n")
    assert called(streaming(*pieces), ASKED) == (200, b"".join(pieces))


def test_what_is_asked_without_the_servers_key_is_not_read() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    invalid = {"kv_transfer_params": {"lmcache_rag": {"ratio": 7}}}
    assert called(app, invalid, keys=("key",))[0] == 401
    assert called(app, invalid, keys=("key",), authorization="Bearer key")[0] == 400
    assert called(app, {}, path="/lmcache-rag/status", keys=("key",))[0] == 401
    assert called(app, {}, path="/lmcache-rag/own", content_type="text/plain")[0] == 415


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/invocations"])
def test_options_are_checked_at_every_endpoint_that_takes_them(path: str) -> None:
    answer = b'{"id": "cmpl-known", "choices": [{}]}'
    status, body = called(streaming(answer), {"kv_transfer_params": {"lmcache_rag": {"ratio": 7}}}, path=path)
    assert status == 400 and "kv_transfer_params.lmcache_rag.ratio" in json.loads(body)["error"]["message"]
    assert called(streaming(answer), {"kv_transfer_params": {"lmcache_rag": {}}}, path=path) == (200, answer)


@pytest.mark.parametrize(("shown", "may"), [("", False), ("Bearer wrong", False), ("Bearer key", True)])
def test_who_has_not_the_servers_key_stores_nowhere(shown: str, may: bool) -> None:
    """Also where vLLM answers without it."""
    scope = {
        "app": SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=["key"]))),
        "headers": [(b"authorization", shown.encode())],
    }
    assert ReuseMiddleware(streaming(b""))._may_store(scope) is may


def test_the_endpoints_that_take_options_are_those_of_vllm() -> None:
    source = Path(find_spec("vllm").submodule_search_locations[0]) / "entrypoints"  # type: ignore[union-attr,index]
    routed = "\n".join(file.read_text() for file in source.rglob("*.py"))
    assert all(f'"{path}"' in routed for path in http._TAKING_OPTIONS)
    taking = {file.parent.name for file in source.rglob("protocol.py") if "kv_transfer_params" in file.read_text()}
    assert taking == {"anthropic", "chat_completion", "cohere", "completion", "responses", "token_in_token_out"}


def test_a_body_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_LONGEST_BODY", 100)
    assert called(streaming(b""), {"prompt": "x" * 100})[0] == 413
