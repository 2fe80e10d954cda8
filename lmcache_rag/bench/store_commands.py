"""The benchmarks of what keeps KV: `lmcache-rag bench store`, `scale` and `faults`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lmcache_rag.bench.commands import MEASURED, JsonOption, bench_app, write_rows
from lmcache_rag.bench.servers import RedisServer, S3Server
from lmcache_rag.blobs.base import Store
from lmcache_rag.blobs.uri import open_store
from lmcache_rag.chunk_kv import key_of
from lmcache_rag.errors import PromptError
from lmcache_rag.library.contents import Selection
from lmcache_rag.library.copying import copy_scope, copy_tables
from lmcache_rag.terminal import CodecOption, DtypeOption, ModelOption, ThreadsOption, err, given, out, show_rows

_TIERS = ("memory", "disk", "s3", "redis")


@bench_app.command("store")
def bench_store_command(
    chunks: Annotated[int, typer.Option(min=8000, help="Chunks recorded, of 100 to 512 tokens each.")] = 100_000,
    folder: Annotated[
        Optional[Path], typer.Option(help="Where the records are put, 1.8 kB a chunk; a temporary folder else.")
    ] = None,
    tiers: Annotated[str, typer.Option(help="Of disk, s3 and redis, those whose speed is measured.")] = "disk,s3,redis",
    json_file: JsonOption = None,
) -> None:
    """Finding stored chunks in prompts, with as many as a large store has; and how fast each kind of store is written
    and read. Needs no model."""
    from lmcache_rag.bench.store import bench_store
    from lmcache_rag.bench.tiers import tier_rates

    chosen = _chosen(tiers, _TIERS[1:])
    with ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory(prefix="lmcache-rag-bench-", dir=folder))
        status = stack.enter_context(err.status(""))
        uris = _started(chosen, stack)
        row = bench_store(Path(store), chunks, status.update)
        rates = []
        for tier in chosen:
            status.update(f"writing and reading: {tier}")
            rates.append({"tier": tier, **tier_rates(open_store(uris.get(tier, f"{store}/blobs")))})
    for name, value in row.items():
        out.print(f"{name}: {value}", highlight=False)
    show_rows(rates)
    write_rows([row, *rates], json_file)


@bench_app.command("faults")
def bench_faults_command(
    trials: Annotated[int, typer.Option(min=1, help="Writers that are killed.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    folder: Annotated[Optional[Path], typer.Option(help="Where the store is put; a temporary folder else.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Kill writers (ingest, eviction, compaction, rebuild, garbage collection) at random moments, and read what they
    leave: nothing acknowledged is lost, nothing is wrong, the limit holds. Needs no model."""
    from lmcache_rag.bench.faults import bench_faults

    with tempfile.TemporaryDirectory(prefix="lmcache-rag-bench-", dir=folder) as store, err.status("") as status:
        rows, wrong = bench_faults(Path(store), trials, status.update, seed)
    show_rows(rows)
    write_rows(rows, json_file)
    for problem in wrong:
        err.problem("wrong:", problem)
    if wrong:
        raise typer.Exit(1)


@bench_app.command("scale")
def bench_scale_command(
    data: Annotated[Path, typer.Option(help="Text: a JSON object with `text`, and perhaps `title`, a line.")],
    limit: Annotated[int, typer.Option(min=5, help="Chunks.")] = 550,
    chunk_tokens: Annotated[int, typer.Option(min=32, help="Tokens per chunk.")] = 580,
    questions: Annotated[int, typer.Option(min=1, help="Questions, each over five chunks drawn at random.")] = 20,
    ratio: Annotated[float, typer.Option(min=0.0, max=1.0, help="Recompute ratio.")] = 0.05,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="KV memory of the engine, of the corpus's KV.")] = 0.01,
    tiers: Annotated[str, typer.Option(help=f"Some of {', '.join(_TIERS)}.")] = ",".join(_TIERS),
    keep: Annotated[
        Optional[Path], typer.Option(help="Folder in which the store stays; the chunks in it are not computed again.")
    ] = None,
    json_file: JsonOption = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """TTFT over a corpus whose KV is many times the engine's KV memory, from memory, disk, an S3 API and Redis."""
    from lmcache_rag.bench.scale import bench_scale, kv_memory, questions_over, read_chunks
    from lmcache_rag.engine import EngineSettings, LocalEngine
    from lmcache_rag.prompt import completion_format
    from lmcache_rag.vllm.worker import bound_model

    chosen = _chosen(tiers, _TIERS)
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lmcache-rag-bench-")))
        status = stack.enter_context(err.status("Starting vLLM"))
        uris = _started(chosen, stack)
        settings = EngineSettings.checked(
            store=folder, **MEASURED, **given(model=model, codec=codec, dtype=dtype, threads=threads)
        )
        with LocalEngine(settings) as engine:
            form, tokenizer = completion_format(), engine.tokenizer
            chunks = read_chunks(tokenizer, data, limit, chunk_tokens)
            status.update(f"ingest: {limit} chunks of {chunk_tokens} tokens")
            engine.precompute(form.preamble_ids(tokenizer), chunks).check()
            prompts = questions_over(tokenizer, form, chunks, questions, of=5, seed=0)
            store, scope = engine.store, engine.chunk_store().scope
            raw_bytes, tokens = bound_model().shape.bytes_per_token, limit * chunk_tokens
            longest = max(len(prompt.token_ids) for prompt in prompts)
            memory = kv_memory(settings, raw_bytes, tokens, longest, share)
            records = engine.chunk_store().records
            stored_bytes = sum(row.size_bytes for ids in chunks for row in records.variants(key_of(ids)).values())
        stores: dict[str, dict[str, Any]] = {"disk": {"store": str(folder)}}
        for tier, uri in uris.items():
            status.update(f"copying the store to {tier}")
            _copy(store, scope.namespace, open_store(uri))
            stores[tier] = {"store": uri}

        def started(fields: dict[str, Any]) -> LocalEngine:
            return LocalEngine(settings.model_copy(update={**memory, **fields}))

        rows = bench_scale(started, stores, prompts, ratio, status.update, hot="memory" in chosen)
    rows = [row for row in rows if row["tier"] in chosen]
    for row in rows:
        row["bytes_per_token"] = round(stored_bytes / tokens)
        row["kv_times_memory"] = round(tokens * raw_bytes / memory["kv_cache_bytes"], 1)
    out.print(
        f"{tokens} tokens of KV: {tokens * raw_bytes / 1e6:.0f} MB uncoded, {stored_bytes / 1e6:.0f} MB stored; "
        f"the engine has {memory['kv_cache_bytes'] / 1e6:.0f} MB of KV memory.",
        highlight=False,
    )
    show_rows(rows)
    write_rows(rows, json_file)


def _chosen(tiers: str, known: Sequence[str]) -> list[str]:
    chosen = [tier.strip() for tier in tiers.split(",") if tier.strip()]
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise PromptError(f"--tiers: there is no {unknown[0]!r}; there are {', '.join(known)}.")
    return chosen


def _started(tiers: Sequence[str], stack: ExitStack) -> dict[str, str]:
    """The URIs of stores on servers, which are started on this machine: first of all, since one may be missing."""
    return {tier: _served(tier, stack) for tier in _TIERS[2:] if tier in tiers}


def _served(tier: str, stack: ExitStack) -> str:
    if tier == "s3":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            os.environ.setdefault(name, "bench")
        return stack.enter_context(S3Server()).uri("bench")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lmcache-rag-redis-"))
    return stack.enter_context(RedisServer(Path(folder), "--appendonly", "no")).uri("bench")


def _copy(store: Store, namespace: str, copy: Store) -> None:
    for scope, records in Selection(namespace).of(store):
        copy_tables(store, copy, scope.model)
        copy_scope(store, copy, scope, records)
