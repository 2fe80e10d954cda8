"""LlamaIndex's messages and tools as engines take them, and answers as LlamaIndex takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.tools.types import BaseTool

from lmcache_rag.engine import Chat, Completion, ToolCall
from lmcache_rag.errors import PromptError

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}
"""Roles that chat templates know by another name."""


def plain_text(messages: Sequence[ChatMessage]) -> str:
    """LlamaIndex's own plain form: a line `role: text` per message, and `assistant: ` at the end.

    Raises:
        PromptError: a message holds more than text.
    """
    for message in messages:
        _check(message, (TextBlock,))
    return messages_to_prompt(messages)


def chat_of(
    messages: Sequence[ChatMessage],
    tools: Sequence[dict[str, Any]] = (),
    tool_choice: str = "auto",
    *,
    parallel: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Chat:
    """A conversation. What the model thought in earlier answers is left out.

    Raises:
        PromptError: a message holds more than text and tool calls, or `tool_choice` names no tool.
    """
    return Chat([_message(message) for message in messages], tools, tool_choice, parallel, template_kwargs or {})


def tool_form(tool: BaseTool) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    return tool.metadata.to_openai_tool(skip_length_check=True)


def tool_choice_of(tool_choice: str | dict[str, Any] | None, *, required: bool) -> str:
    """LlamaIndex's ways to say which tool is to be called, as `Chat.tool_choice`."""
    if isinstance(tool_choice, dict):
        return str(tool_choice["function"]["name"])
    return tool_choice or ("required" if required else "auto")


def answer_message(completion: Completion) -> ChatMessage:
    """A whole answer: its text, and the calls that the model asks for, as blocks and, where parts of LlamaIndex look
    for them still, in OpenAI's form."""
    calls = [_block(call) for call in completion.tool_calls]
    # LlamaIndex writes "None" for an answer without blocks.
    text: list[ContentBlock] = [TextBlock(text=completion.text)] if completion.text or not calls else []
    older = {"tool_calls": [_call(block) for block in calls]} if calls else {}
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=[*text, *calls], additional_kwargs=older)


def calls_in(message: ChatMessage) -> list[ToolCallBlock]:
    """The tool calls of an assistant's message."""
    return [block for block in message.blocks if isinstance(block, ToolCallBlock)]


def _message(message: ChatMessage) -> dict[str, Any]:
    _check(message, (TextBlock, ToolCallBlock, ThinkingBlock))
    form: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role.value),
        "content": "\n".join(block.text for block in message.blocks if isinstance(block, TextBlock)),
    }
    calls = [_call(block) for block in calls_in(message)] or message.additional_kwargs.get("tool_calls")
    if calls:
        form["tool_calls"] = [call if isinstance(call, dict) else call.model_dump() for call in calls]
    if form["role"] == "tool":
        form["tool_call_id"] = message.additional_kwargs.get("tool_call_id") or ""
    return form


def _call(block: ToolCallBlock) -> dict[str, Any]:
    given = block.tool_kwargs
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    function = {"name": block.tool_name, "arguments": arguments}
    return {"id": block.tool_call_id or "", "type": "function", "function": function}


def _block(call: ToolCall) -> ToolCallBlock:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = None
    readable = isinstance(arguments, dict)  # else the tool is called without, and says what it lacks
    return ToolCallBlock(
        tool_call_id=call.call_id, tool_name=call.name, tool_kwargs=arguments if readable else call.arguments
    )


def _check(message: ChatMessage, kinds: tuple[type, ...]) -> None:
    for block in message.blocks:
        if not isinstance(block, kinds):
            raise PromptError(f"The model reads text only, but a message holds a {type(block).__name__}: remove it.")
