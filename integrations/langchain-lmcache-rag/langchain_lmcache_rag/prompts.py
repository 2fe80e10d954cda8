"""Messages and templates as the engine and the model take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_openai_messages,
)
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, MessagesPlaceholder, PromptTemplate

from lmcache_rag.errors import PromptError

_LABELS = {"user": "User: ", "assistant": "Assistant: "}

_NOT_SAID = {"tool_use", "tool_call", "function_call", "invalid_tool_call", "reasoning", "thinking"}
"""Blocks of AI messages that are no text: calls are in `tool_calls` too, and chat templates leave thoughts out."""


def turns_of(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, as `Chat` takes them: role, text, calls and their results.

    Raises:
        PromptError: a message holds more than text, or is none of a conversation's.
    """
    return [_turn(message) for message in messages]


def plain_text(messages: Sequence[BaseMessage]) -> str:
    """A plain form, which suits base models and very small instruction-tuned ones; paragraphs between messages.

    One question is written as it is, behind the system messages if there are any, and the model continues the text: a
    prompt ends best with something like `Answer:`. In a conversation each turn is labelled `User: ` or `Assistant: `,
    and the text ends with `Assistant:`.

    Raises:
        PromptError: see `turns_of`; or there are calls of tools, or their results.
    """
    turns = turns_of(messages)
    if any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
        raise PromptError("Plain prompts have no form for tool calls and ToolMessages: use chat_template=True.")
    if [turn["role"] for turn in turns if turn["role"] != "system"] == ["user"]:
        return "\n\n".join(turn["content"] for turn in turns)
    paragraphs = [_LABELS.get(turn["role"], "") + turn["content"] for turn in turns]
    return "\n\n".join([*paragraphs, "Assistant:"])


def preamble_of(
    prompt: BasePromptTemplate[Any] | str, context: str, render: Callable[[Sequence[BaseMessage]], str]
) -> str:
    """All text before the retrieved documents in a chain's prompts.

    Args:
        prompt: the chain's prompt template; a string is one with `{variables}`.
        context: name of the variable that stands for the documents.
        render: writes messages as the model reads them.

    Raises:
        PromptError: the template has no such variable, or what stands before it differs from prompt to prompt.
    """
    template = PromptTemplate.from_template(prompt) if isinstance(prompt, str) else prompt
    marks = {name: f"\x02{name}\x02" for name in template.input_variables}
    placeholders = _placeholders(template)
    values = {name: [HumanMessage(mark)] if name in placeholders else mark for name, mark in marks.items()}
    preamble, mark, _ = render(template.format_prompt(**values).to_messages()).partition(f"\x02{context}\x02")
    if not mark:
        raise PromptError(f"The prompt has no variable {{{context}}}: mark with it where the documents stand.")
    for name, mark in marks.items():
        if mark in preamble:
            raise PromptError(
                f"In the prompt {{{name}}} stands before {{{context}}}, so that no two prompts begin alike: "
                "move it behind."
            )
    return preamble


def _placeholders(template: BasePromptTemplate[Any]) -> set[str]:
    if not isinstance(template, ChatPromptTemplate):
        return set()
    return {message.variable_name for message in template.messages if isinstance(message, MessagesPlaceholder)}


def _turn(message: BaseMessage) -> dict[str, Any]:
    known = isinstance(message, SystemMessage | HumanMessage | AIMessage | ToolMessage)
    if not known and not (isinstance(message, ChatMessage) and message.role in ("system", "user", "assistant")):
        raise PromptError(
            f"The model takes system, human, AI and tool messages, not a {type(message).__name__}: leave it out."
        )
    turn = convert_to_openai_messages(message.model_copy(update={"content": _text(message)}))
    assert isinstance(turn, dict)
    return turn


def _text(message: BaseMessage) -> str:
    """A message's text, also where it is given as a list of text blocks."""
    blocks = [message.content] if isinstance(message.content, str) else message.content
    if isinstance(message, AIMessage):
        blocks = [block for block in blocks if isinstance(block, str) or block.get("type") not in _NOT_SAID]
    for block in blocks:
        if not isinstance(block, str) and block.get("type") != "text":
            raise PromptError(
                f"The model reads text only, but a message holds a block of type {block.get('type')!r}: remove it."
            )
    return "".join(block if isinstance(block, str) else block["text"] for block in blocks)
