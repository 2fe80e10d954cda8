"""What stands before the retrieved nodes in the prompts of a template."""

from __future__ import annotations

from collections.abc import Callable

from llama_index.core.prompts import BasePromptTemplate

from lmcache_rag.errors import PromptError

CONTEXT = "context_str"
"""LlamaIndex's own name of the variable that stands for the retrieved nodes."""


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
