"""`lmcache-rag serve`: vLLM's own OpenAI server with worker and connector in another process, over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.corpus import Manifest
from lmcache_rag.prompt import completion_format
from tests.helpers import parts, random_plan
from tests.models import make_tiny

pytestmark = pytest.mark.usefixtures("no_engine")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    model = make_tiny("llama", folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    index = folder / "index"
    index.mkdir()
    Manifest(
        model=str(model), model_fingerprint="", dtype="float32", tokenizer_fingerprint="", namespace="default",
        store=Path("kv"), codec="raw", prompt=completion_format(), chunk_tokens=512, overlap_tokens=0,
        embedding_model="none",
    ).write(index)  # fmt: skip
    command = [
        sys.executable, "-c", "from lmcache_rag.cli import main; main()", "serve", "--index", str(index),
        "--port", str(port), "--clients-precompute", "--",
        "--kv-cache-memory-bytes", str(64 << 20), "--max-logprobs", "10", "--served-model-name", "tiny",
    ]  # fmt: skip
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ})
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 500
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            break
        except OSError:
            time.sleep(1)
    yield address
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0, "Ctrl-C did not end the server cleanly"


def complete(server: str, token_ids: list[int], max_tokens: int = 1, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": token_ids, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server}/v1/completions",
        json.dumps(body | fields).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


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


def test_invalid_options_pass_through_and_say_so(server: str) -> None:
    done = complete(server, list(range(5, 60)), kv_transfer_params={"lmcache_rag": {"ratio": 7}})
    assert reuse(done)["mode"] == "plain"
    assert "ratio" in reuse(done)["reason"]


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
