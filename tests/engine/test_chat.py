"""Conversations as prompts."""

from __future__ import annotations

import pytest

from lmcache_rag.engine import Chat
from lmcache_rag.errors import PromptError

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
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "warmth", "arguments": arguments}}
    with pytest.raises(PromptError, match="no JSON object"):
        Chat([ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]).turns()


def test_tools_are_offered_and_forced() -> None:
    assert not Chat([ASKED]).offers_tools
    assert not Chat([ASKED], [TOOL], "none").offers_tools
    assert Chat([ASKED], [TOOL]).offers_tools
    assert not Chat([ASKED], [TOOL]).forces_tools
    assert Chat([ASKED], [TOOL], "warmth").forces_tools
