"""The primer: passages that stand between preamble and chunk at ingest, and whose own KV is thrown away.

In a prompt a chunk mostly has other passages before it. KV computed behind some passages, whichever they are, is much
nearer to that than KV computed behind the preamble alone; see docs/blending.md.
"""

from __future__ import annotations

from importlib.resources import files

from lmcache_rag.prompt import Tokenizer


def default_primer() -> str:
    """Invented passages of several kinds, the same for every index, so that indexes share stored KV."""
    return (files("lmcache_rag") / "primer.txt").read_text(encoding="utf-8")


def primer_ids(tokenizer: Tokenizer, room: int, text: str | None = None) -> list[int]:
    """Token ids of a primer, by default of the default one: the first `room` of them at most."""
    written = default_primer() if text is None else text
    return tokenizer.encode(written, add_special_tokens=False)[: max(0, room)] if written else []
