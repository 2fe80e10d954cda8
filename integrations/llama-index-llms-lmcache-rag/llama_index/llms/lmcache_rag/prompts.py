"""What templates are given, and what stands before the retrieved nodes in their prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llama_index.core.prompts import BasePromptTemplate

from lmcache_rag.errors import PromptError

CONTEXT = "context_str"
"""LlamaIndex's own name of the variable that stands for the retrieved nodes."""


def as_texts(variables: Mapping[str, Any]) -> dict[str, Any]:
    """A template's variables, where lists of texts are these texts. LlamaIndex's `SimpleSummarize` gives the context as
    a list, which templates write as Python does, in quotes and with escaped ends of lines: models read it worse, and
    no stored passage is in it."""
    return {name: _as_text(value) for name, value in variables.items()}


def _as_text(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return "\n\n".join(value)
    return value


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
