"""Servers as an engine: SmolLM2 behind `lmcache-rag serve`, and servers that fail."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lmcache_rag.bench.text import token_runs
from lmcache_rag.engine import Chat, RemoteEngine, Sampling
from lmcache_rag.errors import EngineError, PromptError
from lmcache_rag.model import DEFAULT_MODEL, resolve_model
from lmcache_rag.prompt import MarkedPrompt, chat_text
from tests.servers import FaultyProxy, RagServer

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Name a colour."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GREET = {"type": "function", "function": {"name": "greet", "description": "Greets someone.", "parameters": PERSON}}


@pytest.fixture
def remote(smollm_server: RagServer) -> Iterator[RemoteEngine]:
    with RemoteEngine(smollm_server.url, patience_s=5.0) as engine:
        yield engine


@pytest.fixture
def proxy(smollm_server: RagServer) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(int(smollm_server.url.rpartition(":")[2]))
    yield proxy
    proxy.close()


def test_text_messages_and_tokens_are_answered_and_streamed(remote: RemoteEngine) -> None:
    prompt = "The capital of France is"
    whole = remote.generate(prompt, Sampling(max_tokens=8))
    assert whole.text.strip()
    assert whole.prompt_tokens == len(remote.tokenizer.encode(prompt))
    assert whole.answer_tokens == 8
    assert 0 < whole.ttft_s <= whole.total_s
    assert whole.finish_reason == "length"
    pieces = list(remote.stream(remote.tokenizer.encode(prompt), Sampling(max_tokens=8)))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert len(pieces) > 2
    assert pieces[-1].completion is not None
    assert remote.generate(Chat(MESSAGES), Sampling(max_tokens=4)).prompt_tokens > whole.prompt_tokens


def test_asyncio_in_one_loop_and_another(remote: RemoteEngine) -> None:
    async def several() -> list[str]:
        prompts = [f"{number} and {number} is" for number in range(4)]
        answers = [remote.agenerate(prompt, Sampling(max_tokens=4)) for prompt in prompts]
        return [answer.text for answer in await asyncio.gather(*answers)]

    assert asyncio.run(several()) == asyncio.run(several())


def test_a_servers_tokenizer_and_template_are_the_models_own(remote: RemoteEngine) -> None:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL))
    text = "Blue, or *green*? 🙂\n\n  Both."
    assert remote.tokenizer.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False)
    assert remote.render(Chat(MESSAGES)) == chat_text(own, MESSAGES)
    assert remote.max_model_len == 4096
    assert remote.model_name == DEFAULT_MODEL


def test_what_is_stored_through_a_server_is_reused(remote: RemoteEngine) -> None:
    preamble = remote.tokenizer.encode("Passages:\n")
    chunks = token_runs(remote.tokenizer, 2, 200)
    told: list[int] = []
    report = remote.precompute(preamble, chunks, told.append, primer=())
    report.check()
    assert report.computed == 2
    assert sorted(told) == sorted(map(len, chunks))
    assert remote.precompute(preamble, chunks, primer=()).present == 2
    remote.own("tests", chunks)
    remote.release("tests", chunks[1:])
    again = remote.precompute(preamble, chunks, primer=())
    assert (again.present, again.computed) == (1, 1)
    prompt = MarkedPrompt.assemble(preamble, chunks, remote.tokenizer.encode("\nQuestion: why?\nAnswer:"))
    reuse = remote.generate(prompt, Sampling(max_tokens=2)).reuse
    assert reuse.mode == "blend"
    assert reuse.reused_tokens + reuse.recomputed_tokens >= sum(map(len, chunks))


def test_a_chunk_that_is_too_long_is_named_and_the_others_are_stored(remote: RemoteEngine) -> None:
    chunks = [[100] * 5000, token_runs(remote.tokenizer, 3, 100)[2]]
    report = remote.precompute(remote.tokenizer.encode("Passages:\n"), chunks, primer=())
    assert list(report.errors) == [0]
    assert "maximum context length" in report.errors[0]
    assert report.computed + report.present == 1


def test_answers_follow_a_structure(remote: RemoteEngine) -> None:
    answer = remote.generate(Chat(MESSAGES), Sampling(max_tokens=96, json_schema=PERSON))
    assert set(json.loads(answer.text)) == {"name", "age"}
    assert remote.generate("A colour:", Sampling(choice=("red", "blue"))).text in ("red", "blue")
    assert remote.generate("A year:", Sampling(regex=r"[0-9]{4}")).text.isdigit()


def test_a_forced_tool_is_called(remote: RemoteEngine) -> None:
    assert not remote.calls_tools  # this model's template leaves tools out: it would answer without having seen them
    with pytest.raises(PromptError, match="not known to offer tools"):
        remote.generate(Chat(MESSAGES, [GREET]))
    answer = remote.generate(Chat(MESSAGES, [GREET], "greet"), Sampling(max_tokens=96))
    assert [call.name for call in answer.tool_calls] == ["greet"]
    assert set(json.loads(answer.tool_calls[0].arguments)) == {"name", "age"}
    assert answer.finish_reason == "tool_calls"
    assert answer.text == ""


def test_refusals_say_what_the_server_says(remote: RemoteEngine) -> None:
    with pytest.raises(PromptError, match="maximum context length is 4096"):
        remote.generate([5] * 5000)
    with pytest.raises(PromptError, match="empty"):
        remote.generate("")
    with pytest.raises(PromptError, match="LocalEngine"):
        remote.generate("a", Sampling(logprobs=3))
    with RemoteEngine(remote.settings.base_url, model="other") as other, pytest.raises(PromptError, match="other"):
        other.generate("a")


def test_copies_ask_the_same_servers(remote: RemoteEngine) -> None:
    for copied in (pickle.loads(pickle.dumps(remote)), copy.deepcopy(remote)):
        assert copied.settings == remote.settings
        assert copied.generate("One, two,", Sampling(max_tokens=2)).text


def test_another_server_answers_where_one_is_not_there(smollm_server: RagServer) -> None:
    with RemoteEngine(["http://127.0.0.1:9", smollm_server.url]) as engine:
        assert [engine.generate(f"{number}:", Sampling(max_tokens=1)).answer_tokens for number in range(3)] == [1] * 3


@pytest.mark.parametrize("fault", [500, "cut"])
def test_a_server_that_fails_is_asked_again(proxy: FaultyProxy, fault: int | str) -> None:
    with RemoteEngine(f"http://127.0.0.1:{proxy.port}", patience_s=20.0) as engine:
        faults = iter([fault])
        proxy.fault = lambda method, path: next(faults, None) if path == "/v1/completions" else None
        answer = engine.generate("One, two,", Sampling(max_tokens=3))
    assert answer.answer_tokens == 3
    assert [path for _, path in proxy.requests].count("/v1/completions") == 2


def test_a_stream_that_is_cut_is_no_whole_answer(proxy: FaultyProxy) -> None:
    with RemoteEngine(f"http://127.0.0.1:{proxy.port}") as engine:
        proxy.fault = lambda method, path: "cut" if path == "/v1/completions" else None
        with pytest.raises(EngineError, match="in the middle of an answer"):
            list(engine.stream("One, two,", Sampling(max_tokens=9)))


def test_no_server_at_all() -> None:
    engine = RemoteEngine("http://127.0.0.1:9", patience_s=0.0)
    with pytest.raises(EngineError, match=r"No server answers at http://127\.0\.0\.1:9/v1"):
        engine.generate("a")
    with pytest.raises(EngineError, match="base_url"):
        RemoteEngine("localhost:8000")


def test_a_client_needs_neither_vllm_nor_torch() -> None:
    code = "import sys; from lmcache_rag.engine import RemoteEngine; RemoteEngine('http://a'); "
    code += "print([name for name in ('vllm', 'torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
