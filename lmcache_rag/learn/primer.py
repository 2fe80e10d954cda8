"""The primer: passages that stand between preamble and chunk at ingest, and whose own KV is thrown away.

In a prompt a chunk mostly has other passages before it. KV computed behind some passages, whichever they are, is much
nearer to that than KV computed behind the preamble alone; see docs/blending.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from lmcache_rag.prompt import PromptFormat, Tokenizer, encode

_PASSAGES = 3
SMALL_CORPUS = 24
"""In a corpus of fewer passages, most are on the question's topic, and as a primer those do more harm than good."""


def default_primer() -> str:
    """Invented passages of several kinds, the same for every small index."""
    return (files("lmcache_rag.learn") / "primer.txt").read_text(encoding="utf-8")


def own_primer(texts: Sequence[str], prompt: PromptFormat) -> str | None:
    """Passages out of a corpus' own, spread over it, since those prime best; None for a small corpus."""
    if len(texts) < SMALL_CORPUS:
        return None
    chosen = [texts[len(texts) * (2 * number + 1) // (2 * _PASSAGES)] for number in range(_PASSAGES)]
    return "".join(prompt.chunk.replace("{text}", text) for text in chosen)


def primer_ids(tokenizer: Tokenizer, text: str, room: int) -> list[int]:
    """Token ids of a primer, the first `room` of them at most."""
    return encode(tokenizer, text, add_special_tokens=False)[: max(0, room)] if text else []
