"""Text to measure with: English prose that every Python installation has."""

from __future__ import annotations

from pydoc_data.topics import topics

from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import Tokenizer


def token_runs(tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """`count` different runs of `length` tokens from Python's own documentation.

    Raises:
        PromptError: the text has too few tokens.
    """
    needed, text, token_ids = count * length, "", list[int]()
    enough = 6 * needed  # characters, at first
    for topic in sorted(topics):
        text += topics[topic] + "\n"
        if len(text) > enough:
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            if len(token_ids) >= needed:
                break
            enough = 2 * len(text)
    else:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    if len(token_ids) < needed:
        raise PromptError(
            f"{count} chunks of {length} tokens are more than the {len(token_ids)} tokens of text there are."
        )
    return [token_ids[start : start + length] for start in range(0, needed, length)]
