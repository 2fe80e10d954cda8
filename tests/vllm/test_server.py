"""`lmcache-rag serve`: vLLM's own OpenAI server with worker and connector in another process, over HTTP."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.engine import RemoteEngine, Sampling
from lmcache_rag.errors import LmcacheRagError
from tests.helpers import parts, random_plan
from tests.models import CONTEXT, make_tiny
from tests.servers import RagServer

pytestmark = pytest.mark.usefixtures("no_engine")


KEY = "the-ingest-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    model = make_tiny("llama", folder / "model")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LMCACHE_RAG_INGEST_KEY", KEY)
        environment.setenv("VLLM_API_KEY", "")
        environment.setenv("VLLM_LOGGING_LEVEL", "INFO")
        started = RagServer(
            folder, str(model),
            ["--kv-cache-memory-bytes", str(64 << 20), "--max-logprobs", "10", "--served-model-name", "tiny"],
        )  # fmt: skip
        started.wait()
    assert "Found KV of 0 chunks" in started.log.read_text()
    yield started.url
    assert started.interrupt() == 0, "Ctrl-C did not end the server cleanly"


def complete(server: str, token_ids: list[int], max_tokens: int = 1, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": token_ids, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return post(server, "/v1/completions", body | fields)


def post(server: str, path: str, body: Any, key: str = KEY) -> Any:
    """A JSON answer; of a stream the list of its chunks."""
    headers = {"Content-Type": "application/json", "X-LMCache-RAG-Ingest-Key": key}
    request = urllib.request.Request(f"{server}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        if not body.get("stream"):
            return json.load(response)
        events = [line[len(b"data: ") :].strip() for line in response if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    return [json.loads(event) for event in events[:-1]]


def refused(server: str, path: str, body: Any, key: str = KEY) -> tuple[int, dict[str, Any]]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, path, body, key)
    return caught.value.code, json.load(caught.value)["error"]


def reuse(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["kv_transfer_params"]["lmcache_rag"]


def test_precompute_blend_and_automatic_matching_over_http(server: str) -> None:
    plan = random_plan(50)
    preamble, chunks, _ = parts(plan)
    for chunk in chunks:
        options = {"mode": "precompute", "segments": [[len(preamble), len(chunk)]]}
        done = complete(server, [*preamble, *chunk], kv_transfer_params={"lmcache_rag": options})
        assert reuse(done)["stored_tokens"] >= len(chunk)
    prompt = list(plan.token_ids)
    off = complete(server, prompt, 8, kv_transfer_params={"lmcache_rag": {"mode": "off"}}, cache_salt="off")
    assert reuse(off)["mode"] == "off"
    segments = [[segment.start, segment.length] for segment in plan.segments]
    options = {"segments": segments, "selector": "all"}
    blended = complete(server, prompt, 8, kv_transfer_params={"lmcache_rag": options}, cache_salt="blended")
    assert reuse(blended)["mode"] == "blend"
    assert reuse(blended)["recomputed_tokens"] == sum(map(len, chunks[1:]))
    assert blended["choices"][0]["text"] == off["choices"][0]["text"]
    # An ordinary request of any client: the chunks are found, and the report is complete after one token too.
    found = complete(server, prompt, 1, cache_salt="plain client")
    assert reuse(found)["mode"] == "blend" and reuse(found)["missed_tokens"] == 0


def stored_prompt(server: str, seed: int) -> tuple[list[int], list[list[int]], list[int]]:
    """Preamble, chunks whose KV is stored, and a prompt of them."""
    plan = random_plan(seed)
    preamble, chunks, _ = parts(plan)
    for chunk in chunks:
        options = {"mode": "precompute", "segments": [[len(preamble), len(chunk)]]}
        complete(server, [*preamble, *chunk], kv_transfer_params={"lmcache_rag": options})
    return preamble, chunks, list(plan.token_ids)


@pytest.mark.parametrize(
    "asked", [{"kv_transfer_params": {"lmcache_rag": {}}}, {"stream_options": {"include_usage": True}}]
)
def test_a_stream_ends_with_its_report(server: str, asked: dict[str, Any]) -> None:
    _, _, prompt = stored_prompt(server, 51)
    streamed = complete(server, prompt, 4, stream=True, cache_salt=str(asked), **asked)
    assert reuse(streamed[-1])["mode"] == "blend"
    assert reuse(streamed[-1])["missed_tokens"] == 0
    assert streamed[-1]["id"] == streamed[0]["id"]
    assert streamed[-1]["choices"] == []
    # vLLM may send several tokens at once; the reason for the end comes before the report.
    assert [choice["finish_reason"] for chunk in streamed for choice in chunk["choices"]][-1] == "length"
    if "stream_options" in asked:
        cached = [chunk["usage"]["prompt_tokens_details"]["cached_tokens"] for chunk in streamed if chunk.get("usage")]
        assert cached[-1] == reuse(streamed[-1])["reused_tokens"]


def test_a_client_that_asks_for_nothing_gets_vllms_own_stream(server: str) -> None:
    streamed = complete(server, [5, 6, 7], 3, stream=True)
    assert all(chunk["choices"] and "kv_transfer_params" not in chunk for chunk in streamed)


def test_an_answer_that_a_stop_string_ends_has_its_report(server: str) -> None:
    _, _, prompt = stored_prompt(server, 52)
    free = complete(server, prompt, 6, cache_salt="free")["choices"][0]["text"]
    stop = free.split()[2]
    for number, fields in enumerate(({}, {"stream": True, "kv_transfer_params": {"lmcache_rag": {}}})):
        done = complete(server, prompt, 6, stop=[stop], cache_salt=f"stop {number}", **fields)
        last = done[-1] if fields else done
        assert reuse(last)["mode"] == "blend"
        assert reuse(last)["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"ratio": 7}, "ratio"), ({"ratoi": 0.1}, "ratoi"), ({"segments": [[5, 5], [2, 2]]}, "segments")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_options_that_are_none_are_refused_by_name(server: str, options: dict, field: str, stream: bool) -> None:
    body = {"model": "tiny", "prompt": [5, 6], "stream": stream, "kv_transfer_params": {"lmcache_rag": options}}
    status, error = refused(server, "/v1/completions", body)
    assert status == 400
    assert f"kv_transfer_params.lmcache_rag.{field}" in error["message"]
    assert error["type"] == "BadRequestError"


@pytest.mark.parametrize("key", ["", "another"])
def test_storing_takes_the_ingest_key(server: str, key: str) -> None:
    options = {"mode": "precompute", "segments": [[2, 3]]}
    body = {"model": "tiny", "prompt": [5, 6, 7, 8, 9], "kv_transfer_params": {"lmcache_rag": options}}
    status, error = refused(server, "/v1/completions", body, key)
    assert status == 403
    assert "ingest key" in error["message"]
    for path in ("missing", "own", "release"):
        assert refused(server, f"/lmcache-rag/{path}", {"chunks": [[1, 2]]}, key)[0] == 403
    body["kv_transfer_params"]["lmcache_rag"] = {"mode": "off"}
    assert post(server, "/v1/completions", body, key)["choices"]


def status_of(server: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server}/lmcache-rag/status", timeout=60) as response:
        return json.load(response)


def test_clients_that_may_store_keep_and_release_chunks(server: str) -> None:
    preamble, chunks, _ = stored_prompt(server, 53)
    other = [200] * 50
    asked = {"preamble": preamble, "chunks": [*chunks, other]}
    assert post(server, "/lmcache-rag/missing", asked) == {"missing": [len(chunks)]}
    assert post(server, "/lmcache-rag/missing", {**asked, "primer": [9] * 20})["missing"] == list(
        range(len(chunks) + 1)
    )
    held = status_of(server)["chunks"]
    post(server, "/lmcache-rag/own", {"owner": "one", "chunks": chunks})
    post(server, "/lmcache-rag/own", {"owner": "two", "chunks": chunks[:1]})
    post(server, "/lmcache-rag/release", {"owner": "one", "chunks": chunks})
    assert post(server, "/lmcache-rag/missing", asked)["missing"] == [*range(1, len(chunks) + 1)]
    assert status_of(server)["chunks"] == held - (len(chunks) - 1)


def test_the_key_is_asked_for_at_every_endpoint(server: str) -> None:
    options = {"mode": "precompute", "segments": [[2, 40]]}
    chunk = [33] * 40
    body = {
        "model": "tiny",
        "prompt": [5, 6, *chunk],
        "max_tokens": 1,
        "kv_transfer_params": {"lmcache_rag": options},
    }
    status, error = refused(server, "/invocations", body, key="")
    assert status == 403 and "ingest key" in error["message"]
    assert post(server, "/lmcache-rag/missing", {"preamble": [5, 6], "chunks": [chunk]})["missing"] == [0]
    assert reuse(post(server, "/invocations", body))["stored_tokens"] > 0


def test_several_answers_have_a_report(server: str) -> None:
    _, _, prompt = stored_prompt(server, 54)
    streamed = complete(server, prompt, 2, stream=True, n=2, temperature=1, kv_transfer_params={"lmcache_rag": {}})
    assert reuse(streamed[-1])["prompt_tokens"] == len(prompt)


def test_an_owner_has_any_name_and_the_namespace_is_the_servers(server: str) -> None:
    asked = {"chunks": [[1, 2]], "owner": "langchain documents /srv/a b.txt"}
    assert post(server, "/lmcache-rag/own", asked) == {}
    assert refused(server, "/lmcache-rag/missing", {**asked, "namespace": "other"})[0] == 403
    assert refused(server, "/lmcache-rag/own", {**asked, "owner": ""})[0] == 400


def test_the_status_says_what_is_served(server: str) -> None:
    stored_prompt(server, 54)
    status = status_of(server)
    assert status["model"] == "tiny"
    assert (status["namespace"], status["may_store"], status["max_model_len"]) == ("default", False, CONTEXT)
    assert status["totals"]["stored_tokens"] > 0
    assert "model_path" not in status, "told to a client that may not store"
    assert KEY not in json.dumps(status)
    assert refused(server, "/lmcache-rag/none-such", {})[0] == 404
    assert refused(server, "/lmcache-rag/own", {"chunks": "all"})[1]["message"].startswith("chunks")


def test_prompt_logprobs_pass_through_and_say_so(server: str) -> None:
    """vLLM drops external tokens for such requests: comparing plain with plain must not look like a perfect blend."""
    done = complete(server, list(random_plan(50).token_ids), prompt_logprobs=1)
    assert reuse(done)["mode"] == "plain"
    assert "prompt logprobs" in reuse(done)["reason"]


def test_a_chat_request_works(server: str) -> None:
    with pytest.raises(urllib.error.HTTPError):  # the tiny model has no chat template; the server stays up
        request = urllib.request.Request(
            f"{server}/v1/chat/completions",
            json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "w5"}]}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=60)
    assert complete(server, [5, 6, 7])["choices"]


def test_figures_are_on_the_metrics_endpoint(server: str) -> None:
    complete(server, [5, 6, 7], 4)
    with urllib.request.urlopen(f"{server}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    ours = [line for line in lines if line.startswith("vllm:lmcache_rag_")]
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in ours}
    assert values["vllm:lmcache_rag_recomputed_tokens_total"] > 0
    assert values["vllm:lmcache_rag_stored_tokens_total"] > 0
    modes = [line for line in lines if line.startswith("vllm:lmcache_rag_requests_total")]
    assert any('mode="blend"' in line for line in modes) and any('mode="off"' in line for line in modes)
    counts = [line for line in ours if line.startswith("vllm:lmcache_rag_request_reused_share_count")]
    assert float(counts[0].rsplit(" ", 1)[1]) > 0
    assert any('phase="load"' in line for line in ours if "request_phase_seconds_count" in line)


def running(engine: RemoteEngine) -> float:
    """How many requests the server still computes or has waiting, a while after clients left."""
    for _ in range(300):
        lines = [line for line in str(engine.get("/metrics")).splitlines() if line.startswith("vllm:num_requests_")]
        assert lines
        count = sum(float(line.rpartition(" ")[2]) for line in lines)
        if not count:
            break
    return count


def test_a_thousand_streams_at_once_and_those_that_leave(server: str) -> None:
    """None is lost, none is mixed up, and what is left early frees the engine."""
    remote = RemoteEngine(server)

    async def stream(number: int) -> str:
        answer = ""
        async for piece in remote.astream(
            [4 + number % 350, 4 + number // 350, 9], Sampling(max_tokens=3, ignore_eos=True)
        ):
            answer += piece.text
            if number % 10 == 9:
                break
            completion = piece.completion
        else:
            assert completion is not None
            assert completion.text == answer
        return answer

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(stream(number) for number in range(1000)))

    answers = asyncio.run(all_of_them())
    for number in (3, 400, 901):
        alone = remote.generate([4 + number % 350, 4 + number // 350, 9], Sampling(max_tokens=3, ignore_eos=True)).text
        assert answers[number] == alone
    assert running(remote) == 0


def test_a_running_server_is_measured(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_INGEST_KEY", KEY)
    asked = ["bench", "serve", "--url", server]
    size = "--requests 4 --concurrency 2 --pool 3 --passages 2 --passage-tokens 60 --rounds 2 --answer-tokens 2"
    rows = measured([*asked, *size.split()], tmp_path / "rows.json")
    named = [(row["workload"], row["mode"], row["requests"]) for row in rows]
    assert named == [(each, mode, 4) for each in ("permuted", "chat") for mode in ("prefix_cache", "blend")]
    assert all(0 < row["ttft_p50_s"] <= row["ttft_p95_s"] for row in rows)
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt": "One", "max_tokens": 2}\n\n{"prompt": "Two", "at_s": 0.1}\n')
    rows = measured([*asked, "--trace", str(trace)], tmp_path / "rows.json")
    assert [(row["workload"], row["requests"]) for row in rows] == [("trace", 2)] * 2
    monkeypatch.setenv("LMCACHE_RAG_INGEST_KEY", "another")
    with pytest.raises(LmcacheRagError, match="ingest key"):
        measured([*asked, *size.split()], tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"prompt": "One"}\n{"at_s": 1}', "line 2 .* has neither"),
        ("[]", "line 1 .* is no request"),
        ("", "is empty"),
        ("\udcff", "cannot be read"),
    ],
)
def test_traces_that_cannot_be_replayed(tmp_path: Path, text: str, problem: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text, errors="surrogateescape")
    with pytest.raises(LmcacheRagError, match=problem):
        measured(["bench", "serve", "--url", "http://127.0.0.1:1", "--trace", str(trace)], tmp_path / "rows.json")


def measured(arguments: list[str], rows: Path) -> Any:
    CliRunner().invoke(app, [*arguments, "--json", str(rows)], catch_exceptions=False)
    return json.loads(rows.read_text())
