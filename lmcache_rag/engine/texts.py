"""Chunks as the texts that frameworks have: tokenised, precomputed, and those that fail named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmcache_rag.engine.base import Engine, PrecomputeReport
from lmcache_rag.errors import PromptError
from lmcache_rag.prompt import encode
from lmcache_rag.records.fingerprints import SHORTEST

FRAMEWORKS = "frameworks"
"""Owns what frameworks had stored, so that no index on the same store deletes it when it lets go of the same text."""


def chunks_of(engine: Engine, texts: Sequence[str]) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Token ids of texts, without the space around them, by their numbers; those are left out that are too short to be
    found in a prompt. And why texts are none."""
    chunks: dict[int, list[int]] = {}
    unreadable: dict[int, str] = {}
    for number, text in enumerate(texts):
        try:
            token_ids = encode(engine.tokenizer, text.strip(), add_special_tokens=False)
        except PromptError as error:
            unreadable[number] = str(error)
            continue
        if len(token_ids) >= SHORTEST:
            chunks[number] = token_ids
    return chunks, unreadable


def prefetch_texts(engine: Engine, texts: Sequence[str]) -> int:
    """`Engine.prefetch` of texts. None is tokenised for an engine that has nothing to do."""
    return engine.prefetch(chunk for text in texts for chunk in chunks_of(engine, [text])[0].values())


def release_texts(engine: Engine, texts: Sequence[str], owner: str = FRAMEWORKS) -> None:
    """`Engine.release` of texts that were precomputed: of a document that was changed or deleted.

    Raises:
        StoreError: the store cannot be read or written to.
    """
    engine.release(owner, list(chunks_of(engine, texts)[0].values()))


def own_texts(engine: Engine, texts: Sequence[str], owner: str) -> None:
    """`Engine.own` of texts that were precomputed for somebody else.

    Raises:
        StoreError: the store cannot be read or written to.
    """
    engine.own(owner, list(chunks_of(engine, texts)[0].values()))


def precompute_texts(
    engine: Engine,
    preamble: Sequence[int],
    texts: Sequence[str],
    progress: Callable[[int], Any] | None = None,
    owner: str = FRAMEWORKS,
) -> PrecomputeReport:
    """`Engine.precompute` of texts, without the space around them; those are left out that are too short to be found in
    a prompt. The numbers in the report's `errors` are those of the texts given, and `owner` owns what is stored.

    Raises:
        StoreError: the store cannot be read or written to.
    """
    chunks, unreadable = chunks_of(engine, texts)
    report = engine.precompute(preamble, list(chunks.values()), progress)
    numbers = list(chunks)
    engine.own(owner, [chunk for place, chunk in enumerate(chunks.values()) if place not in report.errors])
    report.errors = unreadable | {numbers[place]: why for place, why in report.errors.items()}
    return report


def failures(report: PrecomputeReport, names: Sequence[str]) -> str:
    """What failed, in a line: each chunk by its name, and why."""
    return "; ".join(f"{names[number]}: {why}" for number, why in sorted(report.errors.items()))
