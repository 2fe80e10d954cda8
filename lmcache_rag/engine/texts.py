"""Chunks as the texts that frameworks have: tokenised, precomputed, and those that fail named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_rag.chunk_kv import key_of
from lmcache_rag.engine.base import PrecomputeReport
from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import encode

if TYPE_CHECKING:
    from lmcache_rag.engine.local import LocalEngine

_OWNER = "frameworks"
"""Owns what frameworks had stored, so that no index on the same store deletes it when it lets go of the same text."""


def precompute_texts(engine: LocalEngine, preamble: Sequence[int], texts: Sequence[str]) -> PrecomputeReport:
    """`Engine.precompute` of texts, without the space around them; blank ones are left out. The numbers in the report's
    `errors` are those of the texts given.

    Raises:
        StoreError: the store cannot be read or written to.
    """
    chunks: dict[int, list[int]] = {}
    unreadable: dict[int, str] = {}
    for number, text in enumerate(texts):
        try:
            token_ids = encode(engine.tokenizer, text.strip(), add_special_tokens=False)
        except PromptError as error:
            unreadable[number] = str(error)
            continue
        if token_ids:
            chunks[number] = token_ids
    report = engine.precompute(preamble, list(chunks.values()))
    numbers = list(chunks)
    stored = [key_of(chunk) for place, chunk in enumerate(chunks.values()) if place not in report.errors]
    engine.chunk_store().own(_OWNER, stored)
    report.errors = unreadable | {numbers[place]: why for place, why in report.errors.items()}
    return report


def failures(report: PrecomputeReport, names: Sequence[str]) -> str:
    """What failed, in a line: each chunk by its name, and why."""
    return "; ".join(f"{names[number]}: {why}" for number, why in sorted(report.errors.items()))
