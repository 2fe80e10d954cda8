"""Bytes stored, bandwidth that pays, and what a load makes of it, besides seconds to the first token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmcache_rag.sizing.formulas import blend_parts, full_prefill_s
from lmcache_rag.sizing.hardware import Hardware
from lmcache_rag.sizing.shapes import ModelShape

SMALLER = {"raw": 0.5, "q8": 1.88, "q4": 3.55, "high": 6.26, "balanced": 8.57, "small": 18.23}
"""Codec -> how much smaller than float16 it makes KV (docs/codec.md); raw is float32, as CPUs compute."""

_BOTH_VARIANTS = {"high": 1.45, "balanced": 1.42, "small": 1.4}
"""Bytes of a chunk's two variants, of those of one (docs/codec.md); others are stored whole twice."""

_INGEST = 2.0
"""Prefills of a chunk that computing both its variants takes."""

_LONGEST = 1 << 17
_BISECTIONS = 40
_MONTH_S = 30 * 86_400


@dataclass(frozen=True)
class Corpus:
    """What is stored, and how it is asked about."""

    tokens: int
    chunk_tokens: int = 512
    passages: int = 5
    question_tokens: int = 64

    @property
    def prompt_tokens(self) -> int:
        """Of one prompt, without the question."""
        return self.passages * self.chunk_tokens


@dataclass(frozen=True)
class Links:
    """Where KV lies and comes from, in bytes per second and money.

    Attributes:
        store_bytes: per second, of the store that chunks are read from.
        memory_bytes: of the hot tier in memory.
        price_gb_month: of the store.
        price_hour: of the machine.
    """

    store_bytes: float
    memory_bytes: float = 0.0
    price_gb_month: float = 0.023
    price_hour: float = 0.0


@dataclass(frozen=True)
class Load:
    """How often is asked, and what about.

    Attributes:
        zipf: exponent of the popularity of chunks; 0 asks about all alike.
    """

    requests_per_s: float = 0.0
    zipf: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """What was estimated; seconds, bytes, tokens, money.

    Attributes:
        hot_share: of the chunks' reads that the hot tier answers.
        break_even_bytes: per second of the store, below which plain prefill is faster; infinite where it always is.
        least_tokens: the shortest prompt that a blend answers sooner; None where none is.
        full_load_s, blend_load_s: TTFT at the load, waiting included; infinite beyond what the machine can do.
    """

    full_s: float
    blend_s: float
    parts_s: dict[str, float]
    stored_bytes: float
    stored_month: float
    ingest_s: float
    hot_share: float
    break_even_bytes: float
    least_tokens: int | None
    corpus_of_kv_memory: float
    full_most_per_s: float
    blend_most_per_s: float
    full_load_s: float
    blend_load_s: float
    saved_month: float

    @property
    def speedup(self) -> float:
        """How many times lower the TTFT is."""
        return self.full_s / self.blend_s


def estimate(
    model: ModelShape, hardware: Hardware, corpus: Corpus, links: Links, load: Load, *, ratio: float, codec: str
) -> Estimate:
    """All of it for one prompt of the corpus, with everything stored."""
    hot = hot_share(corpus, links.memory_bytes / model.kv_bytes, load.zipf)
    smaller = 1.0 if codec == "raw" and not hardware.measured else SMALLER[codec]  # GPUs compute in 16 bits
    coded = model.kv_bytes / smaller
    prompt, question = corpus.prompt_tokens, corpus.question_tokens

    def parts(tokens: int) -> dict[str, float]:
        return blend_parts(model, hardware, tokens, question, ratio, (1 - hot) * coded / links.store_bytes)

    full_s, blend = full_prefill_s(model, hardware, prompt + question), parts(prompt)
    blend_s = sum(blend.values())
    without_reading = blend_s - blend["read"]
    left = full_s - without_reading
    stored = corpus.tokens * coded * _BOTH_VARIANTS.get(codec, 2.0)
    most = [1 / (each - hardware.floor_s) for each in (full_s, blend_s)]
    waits = [_waiting_s(load.requests_per_s, 1 / rate) for rate in most]
    saved_s = max(0.0, full_s - blend_s) * load.requests_per_s * _MONTH_S
    return Estimate(
        full_s=full_s,
        blend_s=blend_s,
        parts_s=blend,
        stored_bytes=stored,
        stored_month=stored / 1e9 * links.price_gb_month,
        ingest_s=_INGEST * corpus.tokens / corpus.chunk_tokens * full_prefill_s(model, hardware, corpus.chunk_tokens),
        hot_share=hot,
        break_even_bytes=(1 - hot) * coded * prompt / left if left > 0 else math.inf,
        least_tokens=_least(lambda n: full_prefill_s(model, hardware, n + question) > sum(parts(n).values())),
        corpus_of_kv_memory=corpus.tokens * model.kv_bytes / hardware.kv_memory_bytes,
        full_most_per_s=most[0],
        blend_most_per_s=most[1],
        full_load_s=full_s + waits[0],
        blend_load_s=blend_s + waits[1],
        saved_month=saved_s / 3600 * links.price_hour,
    )


def hot_share(corpus: Corpus, held_tokens: float, zipf: float) -> float:
    """Of reads of chunks, those that an LRU cache of so many tokens answers, by Che's approximation (2002)."""
    chunks = max(1, corpus.tokens // corpus.chunk_tokens)
    held = held_tokens / corpus.chunk_tokens
    if held >= chunks:
        return 1.0
    if held < 1:
        return 0.0
    popularity = np.arange(1, chunks + 1, dtype=np.float64) ** -zipf
    popularity /= popularity.sum()

    def kept(reads: float) -> np.ndarray:
        return -np.expm1(-popularity * reads)

    low, high = 0.0, 1.0  # how many reads a chunk stays for
    while kept(high).sum() < held:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle).sum() < held else (low, middle)
    return float((popularity * kept(high)).sum())


def _waiting_s(requests_per_s: float, service_s: float) -> float:
    """Mean time in the queue of one server whose service takes always the same time (M/D/1)."""
    busy = requests_per_s * service_s
    return math.inf if busy >= 1 else busy * service_s / (2 * (1 - busy))


def _least(pays: Callable[[int], bool]) -> int | None:
    """The smallest number of tokens at which something pays, to a sixteenth."""
    tokens = 16
    while tokens < _LONGEST:
        if pays(tokens):
            return tokens
        tokens += max(16, tokens // 16)
    return None
