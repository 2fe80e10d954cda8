"""Conversations as prompts."""

from __future__ import annotations

import pytest

from lmcache_rag.engine import Chat
from lmcache_rag.engine.calls import call_of
from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import chat_text

ASKED = {"role": "user", "content": "How warm is it?"}
TOOL = {"type": "function", "function": {"name": "warmth", "parameters": {"type": "object", "properties": {}}}}


def test_turns_are_as_chat_templates_take_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "warmth", "arguments": '{"city": "Bern"}'}}
    chat = Chat([ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}])
    said = chat.turns()[1]
    assert said["content"] == ""
    assert said["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert call["function"]["arguments"] == '{"city": "Bern"}', "the caller's own message was changed"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": []}, "no messages"),
        ({"messages": [ASKED], "tools": [{"type": "function", "function": {}}]}, "has no name"),
        ({"messages": [ASKED], "tools": [TOOL], "tool_choice": "other"}, r"names no tool \(tools: warmth\)"),
        ({"messages": [ASKED], "tool_choice": "required"}, "none are given"),
    ],
)
def test_what_is_no_conversation_is_refused(given: dict, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Chat(**given)


@pytest.mark.parametrize("arguments", ["{", "[1]", '"text"'])
def test_arguments_that_are_no_object_are_left_out_so_that_the_conversation_goes_on(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "warmth", "arguments": arguments}}
    turns = Chat([ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]).turns()
    assert turns[1]["tool_calls"][0]["function"] == {"name": "warmth", "arguments": {}}


def test_what_a_template_takes_besides_is_given_to_it() -> None:
    class Tokenizer:
        chat_template = "{{ enable_thinking }}"

        def apply_chat_template(self, turns: list[dict], *, tokenize: bool, **given: object) -> str:
            return f"{turns[0]['content']} {given.get('enable_thinking')}"

    chat = Chat([ASKED], template_kwargs={"enable_thinking": False})
    assert chat_text(Tokenizer(), chat.turns(), template_kwargs=chat.template_kwargs) == "How warm is it? False"
    sent = call_of(chat, None, None, None).body["extra_body"]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in call_of(Chat([ASKED]), None, None, None).body["extra_body"]


def test_tools_are_offered_and_forced() -> None:
    assert not Chat([ASKED]).offers_tools
    assert not Chat([ASKED], [TOOL], "none").offers_tools
    assert Chat([ASKED], [TOOL]).offers_tools
    assert not Chat([ASKED], [TOOL]).forces_tools
    assert Chat([ASKED], [TOOL], "warmth").forces_tools
