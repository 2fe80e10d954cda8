"""What templates are given, and what stands before the retrieved nodes in their prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llama_index.core.prompts import BasePromptTemplate, RichPromptTemplate

from lmcache_rag.errors import PromptError

CONTEXT = "context_str"
"""LlamaIndex's own name of the variable that stands for the retrieved nodes."""


def as_texts(template: BasePromptTemplate, variables: Mapping[str, Any]) -> dict[str, Any]:
    """A template's variables, where a context that is a list of texts is these texts. LlamaIndex's `SimpleSummarize`
    gives it so, which templates write as Python does, in quotes and with escaped ends of lines: models read it worse,
    and no stored passage is in it. Templates of Jinja may go through a list themselves."""
    context = variables.get(CONTEXT)
    if isinstance(context, list) and context and not isinstance(template, RichPromptTemplate):
        return {**variables, CONTEXT: "\n\n".join(map(str, context))}
    return dict(variables)


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
