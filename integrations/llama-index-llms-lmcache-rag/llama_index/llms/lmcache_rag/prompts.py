"""Messages and templates as the text that the model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt
from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.prompts import BasePromptTemplate

from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import chat_text

CONTEXT = "context_str"
"""LlamaIndex's own name of the variable that stands for the retrieved nodes."""


def plain_text(messages: Sequence[ChatMessage]) -> str:
    """LlamaIndex's own plain form: a line `role: text` per message, and `assistant: ` at the end.

    Raises:
        PromptError: a message holds more than text.
    """
    _check_text(messages)
    return messages_to_prompt(messages)


def chat_form(tokenizer: Any, messages: Sequence[ChatMessage]) -> str:
    """The model's own chat template, up to where its answer begins.

    Raises:
        PromptError: a message holds more than text, or the model has no chat template.
    """
    _check_text(messages)
    return chat_text(
        tokenizer, [{"role": message.role.value, "content": message.content or ""} for message in messages]
    )


def preamble_of(template: BasePromptTemplate, render: Callable[..., str]) -> str:
    """All text before the retrieved nodes in a prompt.

    Args:
        template: a prompt template with the variable `context_str`.
        render: gives the whole prompt's text, called with a value per variable.

    Raises:
        PromptError: the template has no `{context_str}`, or what stands before it differs from prompt to prompt.
    """
    open_variables = {CONTEXT, "query_str", *template.template_vars} - template.kwargs.keys()
    marks = {name: f"\x02{name}\x02" for name in open_variables}
    preamble, mark, _ = render(**marks).partition(f"\x02{CONTEXT}\x02")
    if not mark:
        raise PromptError(f"The prompt template has no variable {{{CONTEXT}}}: mark with it where the nodes stand.")
    for name in sorted(open_variables):
        if marks[name] in preamble:
            raise PromptError(
                f"In the prompt template {{{name}}} stands before {{{CONTEXT}}}, so that no two prompts begin alike: "
                "move it behind."
            )
    return preamble


def _check_text(messages: Sequence[ChatMessage]) -> None:
    for message in messages:
        for block in message.blocks:
            if not isinstance(block, TextBlock):
                raise PromptError(
                    f"The model reads text only, but a message holds a {type(block).__name__}: remove it."
                )
