"""What finding stored chunks costs, with as many as a large store has: synthetic records, and no objects.

One process writes, another one looks up. The tokens have what real text has and noise has not: frequent words and
phrases, and headers that the chunks of a document, or all chunks, begin with.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import KVScope, key_of, variant_of
from lmcache_rag.library.chunks import ChunkStore, ChunkStores
from lmcache_rag.plan.budget import ASSUMED
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.plan.planner import Planner
from lmcache_rag.records.catalog import find
from lmcache_rag.records.part import VariantRow
from lmcache_rag.records.records import Records
from lmcache_rag.request import BlendOptions, ReuseReport

Row = dict[str, Any]

MODEL = "0" * 32
_BATCH = 4096
_VOCABULARY, _PHRASES = 49_152, 200_000
_SHORTEST_CHUNK, _LONGEST_CHUNK = 100, 512
_DOCUMENT_CHUNKS = 32
_HEADER_TOKENS = 80
_SAME_HEADER_CHUNKS = 8000
_BYTES_PER_TOKEN = 2700
_PROMPT_TOKENS = 8000
_LOOKUPS, _PROMPTS, _WRITES = 2000, 300, 20
_PLACES = 24
"""Prompts take their chunks from so many places of the store."""


def bench_store(folder: Path, chunks: int, progress: Callable[[str], Any]) -> Row:
    """The row that `lmcache-rag bench store` writes; the records lie in `folder`."""
    process, writer = _start_writer(folder)
    try:
        progress(f"writing the records of {chunks} chunks")
        start = time.perf_counter()
        _ask(writer, "text", chunks)
        written_s = time.perf_counter() - start
        _ask(writer, "headed", _SAME_HEADER_CHUNKS)
        progress("looking up")
        prompts = [_prompt(seed, chunks) for seed in range(_PROMPTS)]
        headed_prompts = list(_headed_prompts())
        store = Counting(DiskStore(folder))
        before = _memory_bytes()
        start = time.perf_counter()
        records = _opened(store, "text")
        opened_s = time.perf_counter() - start
        matched = [_timed(partial(find, records, prompt)) for prompt in prompts]
        memory = _memory_bytes() - before
        planned, calls = _planned(store, prompts)
        headed = _opened(store, "headed")
        row = {
            "chunks": chunks,
            "open_s": round(opened_s, 4),
            **_percentiles("lookup", _lookups(store, chunks)),
            **_percentiles("match_8k", matched),
            "boilerplate_match_p99_ms": _percentile(
                [_timed(partial(find, headed, prompt)) for prompt in headed_prompts], 99
            ),
            **_percentiles("plan_8k", planned),
            "refresh_after_write_ms": _percentile(_refreshes(writer, records, chunks), 50),
            "index_bytes_per_chunk": round(memory / chunks, 1),
            "mapped_bytes_per_chunk": round(sum(part.size_bytes for part in records.parts if part.mapped) / chunks),
            "mapped_token_bytes_per_chunk": round(
                sum(part.tokens.nbytes for part in records.parts if part.mapped) / chunks
            ),
            "scheduler_calls_per_plan": round(sum(calls) / len(calls), 2),
            "parts": len(records.parts),
            "found_tokens_share": _found_share(records, prompts),
            "write_chunks_per_s": round(chunks / written_s),
        }
    finally:
        writer.send(None)
        process.join()
    return row


class Counting:
    """A store that counts what it is asked."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not callable(method) or name == "tier_of":  # which is known without asking
            return method

        def counted(*arguments: Any) -> Any:
            self.calls[name] += 1
            return method(*arguments)

        return counted


@lru_cache(maxsize=2 * _PLACES)
def batch(number: int, *, headed: bool = False) -> list[np.ndarray]:
    """Chunks `number` times 4,096 and on: int32 token ids; with the same header where `headed`, else with their
    document's."""
    words, starts, lengths = _phrases()
    draw = np.random.default_rng([number, headed])
    sizes = draw.integers(_SHORTEST_CHUNK, _LONGEST_CHUNK + 1, _BATCH)
    chosen = _zipf(draw, _PHRASES, int(sizes.sum() / lengths.mean() * 1.1) + 100)
    count = lengths[chosen]
    ends = np.cumsum(count)
    text = words[np.arange(ends[-1]) + np.repeat(starts[chosen] - (ends - count), count)]
    if len(text) < sizes.sum():
        text = np.concatenate([text, text])
    chunks = np.split(text[: sizes.sum()], np.cumsum(sizes)[:-1])
    for place, chunk in enumerate(chunks):
        document = 0 if headed else number * (_BATCH // _DOCUMENT_CHUNKS) + place // _DOCUMENT_CHUNKS + 1
        header = _header(document)
        if headed or document % 4:  # some documents have none
            chunk[: min(len(header), len(chunk))] = header[: len(chunk)]
    return chunks


def _write(pipe: Connection, folder: Path) -> None:
    """The process that writes."""
    records = {name: Records(DiskStore(folder), KVScope(name, MODEL)) for name in ("text", "headed")}
    while (command := pipe.recv()) is not None:
        name, first, last = command
        for number in range(first // _BATCH, -(-last // _BATCH)):
            chunks = batch(number, headed=name == "headed")
            wanted = chunks[max(0, first - number * _BATCH) : last - number * _BATCH]
            _add(records[name], wanted)
        if last - first > 1:
            records[name].compact()
        pipe.send("done")


def _add(records: Records, chunks: Sequence[np.ndarray]) -> None:
    """Record two variants of each chunk, as an index stores them."""
    keys = {key_of(chunk): chunk for chunk in chunks}
    variants = [variant_of([1, 2, 3]), variant_of([1, 2, 3], [4, 5, 6])]
    rows = [
        VariantRow(key, f"{variant}.balanced", _BYTES_PER_TOKEN * len(chunk), 1)
        for key, chunk in keys.items()
        for variant in variants
    ]
    records.add(keys, rows)


def _start_writer(folder: Path) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_write, args=(theirs, folder), daemon=True)
    process.start()
    return process, ours


def _ask(writer: Connection, name: str, last: int, first: int = 0) -> None:
    writer.send((name, first, last))
    writer.recv()


def _opened(store: Any, name: str) -> Records:
    records = Records(store, KVScope(name, MODEL))
    records.refresh()
    return records


def _lookups(store: Any, chunks: int) -> list[float]:
    """Seconds to find a chunk's variants by its tokens."""
    opened = ChunkStore(store, KVScope("text", MODEL), "balanced")
    opened.refresh()
    draw = np.random.default_rng(0)
    seconds = []
    for place in range(_PLACES):
        own = _stored(place, chunks)
        numbers = draw.integers(0, len(own), _LOOKUPS // _PLACES).tolist()
        seconds += [_timed(partial(_variants, opened, own[number])) for number in numbers]
    return seconds


def _variants(chunks: ChunkStore, chunk: np.ndarray) -> None:
    assert chunks.variants(key_of(chunk))


def _planned(store: Counting, prompts: Sequence[np.ndarray]) -> tuple[list[float], list[int]]:
    """Seconds per plan, and how often the store was asked for it."""
    planner = Planner(
        ChunkStores(store, MODEL, "balanced"),  # type: ignore[arg-type]
        ASSUMED,
        namespace="text",
        matcher=Matcher(),
        max_tokens=1 << 20,
        never_slower=True,
    )
    planner.plan(prompts[0], BlendOptions(), ReuseReport())  # opens the records
    seconds, calls = [], []
    for prompt in prompts:
        before = store.calls.total()
        seconds.append(_timed(partial(planner.plan, prompt, BlendOptions(), ReuseReport())))
        calls.append(store.calls.total() - before)
    return seconds, calls


def _refreshes(writer: Connection, records: Records, chunks: int) -> list[float]:
    """Seconds to take over one chunk that the other process has written."""
    records.refresh()
    seconds = []
    for number in range(_WRITES):
        _ask(writer, "text", chunks + number + 1, chunks + number)
        before = records.position
        seconds.append(_timed(records.refresh))
        assert records.position != before
    return seconds


def _prompt(seed: int, chunks: int) -> np.ndarray:
    """Stored chunks, parts of chunks, chunks with a few tokens changed, and new text: 8,000 tokens."""
    draw = np.random.default_rng([seed, 7])
    pieces, length = [np.arange(50, dtype=np.int32)], 50
    own = _stored(seed % _PLACES, chunks)
    new = batch(1_000_000 + seed % 3)
    while length < _PROMPT_TOKENS:
        kind, chunk = draw.random(), own[draw.integers(len(own))].copy()
        if kind < 0.2:
            chunk = chunk[draw.integers(len(chunk) // 2) :]
        elif kind < 0.4:
            chunk[draw.integers(0, len(chunk), 3)] = 7
        elif kind < 0.5:
            chunk = new[draw.integers(len(new))]
        pieces.append(chunk)
        length += len(chunk)
    return np.concatenate(pieces)[:_PROMPT_TOKENS]


def _stored(place: int, chunks: int) -> list[np.ndarray]:
    """Some of the chunks that are stored, from one of so many places."""
    number = place * -(-chunks // _BATCH) // _PLACES
    return batch(number)[: chunks - number * _BATCH]


def _headed_prompts() -> Iterator[np.ndarray]:
    """Prompts over chunks that all begin alike, and over near misses: the same header before new text."""
    stored = [*batch(0, headed=True), *batch(1, headed=True)][:_SAME_HEADER_CHUNKS]
    new = batch(1_000_000, headed=True)
    for seed in range(_PROMPTS):
        draw = np.random.default_rng([seed, 8])
        chosen = [stored[number] for number in draw.integers(0, len(stored), 14)]
        near = [new[number] for number in draw.integers(0, len(new), 14)]
        pieces = [chunk for pair in zip(chosen, near, strict=True) for chunk in pair]
        yield np.concatenate(pieces)[:_PROMPT_TOKENS]


def _found_share(records: Records, prompts: Sequence[np.ndarray]) -> float:
    """The share of the prompts' tokens that was found, so that what is measured is seen to work."""
    found = sum(match.length for prompt in prompts for match in find(records, prompt).matches)
    return round(found / sum(map(len, prompts)), 3)


@cache
def _phrases() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Phrases of 3 to 12 words, frequent words more often: all words, and where each phrase begins and how long it
    is."""
    draw = np.random.default_rng(1)
    lengths = draw.integers(3, 13, _PHRASES)
    words = _zipf(draw, _VOCABULARY, int(lengths.sum())).astype(np.int32)
    return words, np.cumsum(lengths) - lengths, lengths


@cache
def _header(document: int) -> np.ndarray:
    return batch_of_words(np.random.default_rng([document, 2]), _HEADER_TOKENS)


def batch_of_words(draw: np.random.Generator, count: int) -> np.ndarray:
    """Words without phrases."""
    return _zipf(draw, _VOCABULARY, count).astype(np.int32)


def _zipf(draw: np.random.Generator, kinds: int, count: int) -> np.ndarray:
    """Numbers below `kinds`, the n-th about n times as rare as the first (Zipf 1949)."""
    return (np.exp(draw.random(count) * np.log(kinds + 1)) - 1).astype(np.int64)


def _timed(do: Callable[[], Any]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def _percentile(seconds: Sequence[float], percent: float) -> float:
    return round(1000 * float(np.percentile(seconds, percent)), 3)


def _percentiles(name: str, seconds: Sequence[float]) -> Row:
    return {f"{name}_p50_ms": _percentile(seconds, 50), f"{name}_p99_ms": _percentile(seconds, 99)}


def _memory_bytes() -> int:
    """This process' memory that is no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))
