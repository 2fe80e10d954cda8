"""What the middleware does to requests and answers, around an application that is not vLLM."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from lmcache_rag.vllm import reports
from lmcache_rag.vllm.http import ReuseMiddleware

KEY = "the-ingest-key"
STORES = {"lmcache_rag": {"mode": "precompute", "segments": [[0, 2]]}}
REPORT = {"mode": "blend", "reused_tokens": 5}


class App:
    """Answers every request with the same pieces, and keeps the bodies that it was sent."""

    def __init__(self, *pieces: bytes, clients_precompute: bool = True) -> None:
        self._pieces = pieces or (b'{"id": "cmpl-1", "choices": [{}]}',)
        transfer = SimpleNamespace(
            kv_connector_extra_config={"store": "memory://http", "clients_precompute": clients_precompute}
        )
        config = SimpleNamespace(kv_transfer_config=transfer, model_config=None)
        self.state = SimpleNamespace(vllm_config=config, args=SimpleNamespace(api_key=None))
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number, piece in enumerate(self._pieces, start=1):
            more = number < len(self._pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": more})


def post(app: App, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    around = ReuseMiddleware(app)

    async def asked(scope: Any, receive: Any, send: Any) -> None:
        await around({**scope, "app": app}, receive, send)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(asked), base_url="http://server") as client:
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(ask())


@pytest.fixture(autouse=True)
def one_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "_reports", OrderedDict({"cmpl-1-0": REPORT}))
    monkeypatch.setenv("LMCACHE_RAG_INGEST_KEY", KEY)


def streamed(*texts: str, done: bytes = b"data: [DONE]\n\n") -> tuple[bytes, ...]:
    events = [{"id": "cmpl-1", "object": "text_completion", "choices": [{"text": text}]} for text in texts]
    return (*(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events), done)


def events_of(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "pieces",
    [streamed("a", "b"), (b"".join(streamed("a", "b")),), streamed("a", "data: [DONE]")],
    ids=["pieces", "one piece", "an answer like an end"],
)
def test_a_streams_report_is_its_last_chunk(pieces: tuple[bytes, ...]) -> None:
    answer = post(App(*pieces), "/v1/completions", {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, report, end = events_of(answer)
    assert end == "[DONE]"
    assert report == {
        "id": "cmpl-1", "object": "text_completion", "choices": [], "kv_transfer_params": {"lmcache_rag": REPORT},
    }  # fmt: skip
    assert len(chunks) == 2 and all(chunk["choices"] for chunk in chunks)


def test_a_stream_of_a_client_that_asks_for_nothing_is_as_it_was() -> None:
    pieces = streamed("a", "b")
    assert post(App(*pieces), "/v1/chat/completions", {"stream": True}).content == b"".join(pieces)


def test_an_answer_without_a_report_is_given_it() -> None:
    answer = post(App(b'{"id": "cmpl-1", "kv_transf', b'er_params": {"a": 1}, "choices": [{}]}'), "/v1/completions", {})
    assert answer.json()["kv_transfer_params"] == {"a": 1, "lmcache_rag": REPORT}
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("wrap", [lambda params: params, lambda params: {"sampling_params": {"extra_args": params}}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages", "/invocations", "/any"])
def test_options_are_checked_wherever_vllm_takes_them(path: str, wrap: Any) -> None:
    app = App()
    refused = post(app, path, wrap({"kv_transfer_params": STORES}))
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "PermissionDeniedError")
    assert KEY not in refused.text
    wrong = post(app, path, wrap({"kv_transfer_params": {"lmcache_rag": {"ratio": 7}}}))
    assert wrong.status_code == 400 and "lmcache_rag.ratio" in wrong.json()["error"]["message"]
    assert app.bodies == []
    body = wrap({"kv_transfer_params": STORES})
    assert post(app, path, body, {"X-LMCache-RAG-Ingest-Key": KEY}).status_code == 200
    assert [json.loads(seen) for seen in app.bodies] == [body]


def test_nobody_stores_where_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMCACHE_RAG_INGEST_KEY")
    refused = post(App(clients_precompute=False), "/v1/completions", {"kv_transfer_params": STORES})
    assert refused.status_code == 403 and "--ingest-key" in refused.json()["error"]["message"]
