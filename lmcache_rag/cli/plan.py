"""`lmcache-rag plan`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.sizing import Corpus, Estimate, Links, Load, estimate, gpus, measured_hardware, model_shape
from lmcache_rag.sizing.estimate import SMALLER
from lmcache_rag.terminal import out, show_rows


def plan(
    model: Annotated[str, typer.Option(help="Folder with a config.json, or a known name, such as llama-3.1-8b.")],
    corpus_tokens: Annotated[int, typer.Option("--tokens", min=1, help="Of the corpus.")] = 10_000_000,
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens per passage.")] = 512,
    passages: Annotated[int, typer.Option(min=1, help="Passages per prompt.")] = 5,
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the passages.")] = 64,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, l40s or l4.")] = "h100",
    count: Annotated[int, typer.Option("--gpus", min=1, help="How many share the model.")] = 1,
    measured: Annotated[
        Optional[list[Path]],
        typer.Option(help="Instead of a GPU: rows of `bench ttft` at two lengths, of this model where it is to run."),
    ] = None,
    store_gb_s: Annotated[float, typer.Option(min=1e-6, help="What the store gives, GB/s: disk or network.")] = 1.0,
    memory_gb: Annotated[float, typer.Option(min=0, help="Of the hot tier in main memory, GB.")] = 0.0,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Recompute ratio.")] = 0.15,
    codec: Annotated[str, typer.Option(help=f"One of {', '.join(SMALLER)}.")] = "balanced",
    requests_per_s: Annotated[float, typer.Option(min=0, help="Prompts a second.")] = 0.0,
    zipf: Annotated[float, typer.Option(min=0, help="How unevenly chunks are asked about; 0 is evenly.")] = 1.0,
    price_gb_month: Annotated[float, typer.Option(min=0, help="Of the store.")] = 0.023,
    price_hour: Annotated[float, typer.Option(min=0, help="Of the machine.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What lmcache-rag would bring, by formulas: bytes, TTFT, money, and where plain prefill is faster."""
    if codec not in SMALLER:
        raise LmcacheRagError(f"--codec: there is no {codec!r}; there are {', '.join(SMALLER)}.")
    shape = model_shape(model)
    hardware = measured_hardware(_rows(measured), shape) if measured else gpus(gpu, count, shape)
    corpus = Corpus(corpus_tokens, chunk_tokens, passages, question_tokens)
    links = Links(1e9 * store_gb_s, 1e9 * memory_gb, price_gb_month, price_hour)
    found = estimate(shape, hardware, corpus, links, Load(requests_per_s, zipf), ratio=ratio, codec=codec)
    if as_json:
        values = {**dataclasses.asdict(found), "speedup": found.speedup, "hardware": hardware.name}
        finite = {name: None if value == math.inf else value for name, value in values.items()}
        out.print(json.dumps(finite, indent=2), soft_wrap=True)
        return
    out.print(
        f"{shape.name} on {hardware.name}, prompts of {corpus.prompt_tokens} + {question_tokens} tokens, r={ratio:g}"
    )
    show_rows(_lines(found, links, requests_per_s))
    out.print(_verdict(found, corpus))
    if not hardware.measured:
        out.print(
            "By data sheets, and by what one H100 gave with a model of 8B parameters (docs/sizing.md): other GPUs and "
            "sizes were not measured."
        )


def _lines(found: Estimate, links: Links, requests_per_s: float) -> list[dict[str, Any]]:
    """What is printed, a line per figure."""
    figures = {
        "TTFT, plain prefill": _seconds(found.full_s),
        "TTFT, blend": f"{_seconds(found.blend_s)} ({found.speedup:.1f}x)",
        "of it": ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in found.parts_s.items()),
        "stored": f"{found.stored_bytes / 1e9:,.1f} GB, {found.stored_month:,.2f} a month",
        "corpus's KV in float16": f"{found.corpus_of_kv_memory:,.1f} times the KV memory",
        "ingest, once": _seconds(found.ingest_s),
        "read from memory": f"{found.hot_share:.0%} of chunks",
        "store must give": f"{found.break_even_bytes / 1e9:.3g} GB/s to pay ({links.store_bytes / 1e9:g} given)",
        "pays from": "no length on" if found.least_tokens is None else f"about {found.least_tokens:,} tokens on",
        "at most": f"{found.full_most_per_s:.3g} prompts/s by plain prefill, {found.blend_most_per_s:.3g} blended",
    }
    if requests_per_s:
        loaded = [_seconds(seconds) for seconds in (found.full_load_s, found.blend_load_s)]
        figures[f"TTFT at {requests_per_s:g} prompts/s"] = f"{loaded[0]} by plain prefill, {loaded[1]} blended"
    if found.saved_month:
        figures["machine time saved"] = f"{found.saved_month:,.0f} a month"
    return [{"figure": name, "estimate": value} for name, value in figures.items()]


def _verdict(found: Estimate, corpus: Corpus) -> str:
    if found.speedup <= 1:
        needed = f"{found.break_even_bytes / 1e9:.3g} GB/s"
        return "Plain prefill is faster here" + ("." if found.break_even_bytes == math.inf else f", below {needed}.")
    if found.least_tokens is not None and found.least_tokens > corpus.prompt_tokens / 2:
        return f"It pays, though prompts below {found.least_tokens:,} tokens are faster by plain prefill."
    return "It pays."


def _seconds(seconds: float) -> str:
    if seconds == math.inf:
        return "never"
    if seconds >= 600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _rows(paths: list[Path]) -> list[dict[str, Any]]:
    """Rows of benchmarks, whether or not a report has packed them up."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            read = json.loads(path.read_text())
            rows += [dict(row) for row in (read["rows"] if isinstance(read, dict) else read)]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LmcacheRagError(f"--measured: {path} has no rows of `bench ttft` ({error}).") from None
    return rows
