"""Messages and templates as the text that the model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, MessagesPlaceholder, PromptTemplate

from lmcache_rag.errors import PromptError

_LABELS = {"user": "User: ", "assistant": "Assistant: "}


def turns_of(messages: Sequence[BaseMessage]) -> list[dict[str, str]]:
    """Role (`system`, `user` or `assistant`) and text of each message.

    Raises:
        PromptError: a message holds more than text, or is none of a conversation's (such as a tool's result).
    """
    return [{"role": _role(message), "content": _text(message)} for message in messages]


def plain_text(messages: Sequence[BaseMessage]) -> str:
    """A plain form, which suits base models and very small instruction-tuned ones; paragraphs between messages.

    One question is written as it is, behind the system messages if there are any, and the model continues the text: a
    prompt ends best with something like `Answer:`. In a conversation each turn is labelled `User: ` or `Assistant: `,
    and the text ends with `Assistant:`.

    Raises:
        PromptError: see `turns_of`.
    """
    turns = turns_of(messages)
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


def _role(message: BaseMessage) -> str:
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, ChatMessage) and message.role in ("system", "user", "assistant"):
        return message.role
    raise PromptError(f"The model takes system, human and AI messages, not a {type(message).__name__}: leave it out.")


def _text(message: BaseMessage) -> str:
    """A message's text, also where it is given as a list of text blocks."""
    blocks = [message.content] if isinstance(message.content, str) else message.content
    for block in blocks:
        if not isinstance(block, str) and block.get("type") != "text":
            raise PromptError(
                f"The model reads text only, but a message holds a block of type {block.get('type')!r}: remove it."
            )
    return "".join(block if isinstance(block, str) else block["text"] for block in blocks)
