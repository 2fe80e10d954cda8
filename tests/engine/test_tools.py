"""Tools and structures in an engine in this process."""

from __future__ import annotations

import json

import pytest

from lmcache_rag.engine import Chat, LocalEngine, Sampling
from lmcache_rag.engine.loop import EngineLoop
from lmcache_rag.engine.tools import ToolReader, tool_parser_of
from lmcache_rag.errors import EngineError, PromptError
from tests.engine.test_remote import GREET, MESSAGES, PERSON


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        (None, None),
        ("{{ messages }} <tool_call>", None),
        ("{% if tools %} <tool_call> {% endif %}", "hermes"),
        ("{% if tools %} <tool_call><function= {% endif %}", "qwen3_coder"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ({"default": "{{ messages }}", "tool_use": "{{ tools }} <|python_tag|>"}, "llama3_json"),
        ("{{ tools }} in a form of its own", None),
    ],
)
def test_the_template_tells_the_parser(template: object, parser: str | None) -> None:
    assert tool_parser_of(template) == parser


def test_a_forced_tool_is_called(smollm: LocalEngine) -> None:
    for choice in ("greet", "required"):
        answer = smollm.generate(Chat(MESSAGES, [GREET], choice, parallel=False), Sampling(max_tokens=128))
        assert answer.finish_reason == "tool_calls"
        assert {call.name for call in answer.tool_calls} == {"greet"}
        assert set(json.loads(answer.tool_calls[0].arguments)) == {"name", "age"}
        assert answer.text == ""
    cut = smollm.generate(Chat(MESSAGES, [GREET], "greet"), Sampling(max_tokens=3))
    assert (cut.tool_calls, cut.finish_reason) == ((), "length")


def test_calls_that_the_model_chooses_are_read_and_the_rest_is_streamed(smollm: LocalEngine) -> None:
    reader = ToolReader(Chat(MESSAGES, [GREET]), smollm.tokenizer, "hermes")
    written = 'I greet her.\n<tool_call>\n{"name": "greet", "arguments": {"name": "Ada", "age": 36}}\n</tool_call>'
    shown = ""
    for token in smollm.tokenizer.encode(written):
        shown += reader.shown(smollm.tokenizer.decode([token]), [token])  # type: ignore[attr-defined]
    text, calls = reader.finish()
    assert shown.strip() == text.strip() == "I greet her."
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("greet", {"name": "Ada", "age": 36})]


def test_a_model_that_knows_no_tools_can_only_be_forced(smollm: LocalEngine) -> None:
    assert not smollm.calls_tools
    with pytest.raises(PromptError, match="tool_parser"):
        smollm.generate(Chat(MESSAGES, [GREET]))
    with pytest.raises(PromptError, match="has no parser 'none-such'"):
        ToolReader(Chat(MESSAGES, [GREET]), smollm.tokenizer, "none-such")


def test_answers_follow_a_structure(smollm: LocalEngine) -> None:
    answer = smollm.generate(Chat(MESSAGES), Sampling(max_tokens=96, json_schema=PERSON))
    assert set(json.loads(answer.text)) == {"name", "age"}
    assert smollm.generate("A colour:", Sampling(choice=("red", "blue"))).text in ("red", "blue")
    assert smollm.generate("A year:", Sampling(regex=r"[0-9]{4}")).text.isdigit()
    assert smollm.generate("Yes or no:", Sampling(grammar='root ::= "yes" | "no"')).text in ("yes", "no")


def test_structures_that_are_none_are_refused(smollm: LocalEngine) -> None:
    with pytest.raises(PromptError, match="give one of"):
        Sampling.checked(regex="a", choice=("b",))
    with pytest.raises(PromptError, match="refused"):
        smollm.generate("A year:", Sampling(regex="(["))
    assert smollm.generate("One, two,", Sampling(max_tokens=1)).answer_tokens == 1


def test_an_answer_that_no_parser_can_read_ends_its_own_request_alone(
    smollm: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ToolReader) -> None:
        raise IndexError("nothing there")

    assert isinstance(smollm._loop, EngineLoop)
    with monkeypatch.context() as patched:
        patched.setattr(ToolReader, "finish", fail)
        with pytest.raises(EngineError, match="cannot be read"):
            smollm.generate(Chat(MESSAGES, [GREET], "greet"), Sampling(max_tokens=4))
    assert smollm.generate("One, two,", Sampling(max_tokens=1)).answer_tokens == 1
