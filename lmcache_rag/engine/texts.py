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


def chunks_of(engine: LocalEngine, texts: Sequence[str]) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Token ids of texts, without the space around them, by their numbers; blank ones are left out. And why texts are
    none."""
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
    return chunks, unreadable


def prefetch_texts(engine: LocalEngine, texts: Sequence[str]) -> int:
    """Have what is stored of texts brought from a slow store into its caches, in the background, since a prompt that
    holds them in this order is about to come. Returns how many objects that is; it waits for none.

    Raises:
        StoreError: the store could not be read lately.
    """
    store = engine.chunk_store(wait=False)
    names = []
    for place, chunk in enumerate(chunks_of(engine, texts)[0].values()):
        forms = store.variants(key_of(chunk))
        primed = [variant for variant in forms if "-" in variant]
        wanted = [forms[variant].name for variant in (primed if primed and place else forms)]
        names += [each for name in wanted for each in store.names_for(name)]
    return store.store.prefetch(names)


def precompute_texts(engine: LocalEngine, preamble: Sequence[int], texts: Sequence[str]) -> PrecomputeReport:
    """`Engine.precompute` of texts, without the space around them; blank ones are left out. The numbers in the report's
    `errors` are those of the texts given.

    Raises:
        StoreError: the store cannot be read or written to.
    """
    chunks, unreadable = chunks_of(engine, texts)
    report = engine.precompute(preamble, list(chunks.values()))
    numbers = list(chunks)
    stored = [key_of(chunk) for place, chunk in enumerate(chunks.values()) if place not in report.errors]
    engine.chunk_store().own(_OWNER, stored)
    report.errors = unreadable | {numbers[place]: why for place, why in report.errors.items()}
    return report


def failures(report: PrecomputeReport, names: Sequence[str]) -> str:
    """What failed, in a line: each chunk by its name, and why."""
    return "; ".join(f"{names[number]}: {why}" for number, why in sorted(report.errors.items()))
