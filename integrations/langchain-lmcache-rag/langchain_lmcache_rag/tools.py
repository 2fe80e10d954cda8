"""Tools and calls: LangChain's forms and the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import InvalidToolCall
from langchain_core.messages import ToolCall as LangChainCall
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.output_parsers.openai_tools import parse_tool_call

from lmcache_rag.engine import ToolCall
from lmcache_rag.errors import PromptError


def choice_of(tool_choice: Any) -> str:
    """LangChain's `tool_choice` as `Chat` takes it: None is `auto`, True and `any` are `required`; a name or OpenAI's
    dictionary of one is the tool to be called.

    Raises:
        PromptError: it is something else.
    """
    named = tool_choice.get("function", {}).get("name") if isinstance(tool_choice, dict) else tool_choice
    if named is None and tool_choice is None:
        return "auto"
    if named is True or named == "any":
        return "required"
    if named is False:
        return "none"
    if not isinstance(named, str):
        raise PromptError(f"tool_choice is auto, none, any, required or the name of a tool (got {tool_choice!r}).")
    return named


def calls_of(found: Sequence[ToolCall]) -> tuple[list[LangChainCall], list[InvalidToolCall]]:
    """The calls of an answer, and those whose arguments are no JSON object."""
    calls, invalid = [], []
    for call in found:
        try:
            parsed = parse_tool_call({"function": {"name": call.name, "arguments": call.arguments or "{}"}})
        except OutputParserException as refusal:
            invalid.append(invalid_tool_call(name=call.name, args=call.arguments, id=call.call_id, error=str(refusal)))
            continue
        if parsed is None or not isinstance(parsed["args"], dict):
            error = f"The arguments are no JSON object: {call.arguments}"
            invalid.append(invalid_tool_call(name=call.name, args=call.arguments, id=call.call_id, error=error))
            continue
        calls.append(tool_call(name=parsed["name"], args=parsed["args"], id=call.call_id))
    return calls, invalid


def call_chunks_of(found: Sequence[ToolCall]) -> list[ToolCallChunk]:
    """The calls of an answer, each as one piece of a stream."""
    return [
        tool_call_chunk(name=call.name, args=call.arguments or "{}", id=call.call_id, index=place)
        for place, call in enumerate(found)
    ]
