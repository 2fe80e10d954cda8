"""The benchmarks of whole applications and of other systems: `lmcache-rag bench answers`, `frameworks` and `peers`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Optional

import typer

from lmcache_rag.bench.commands import MEASURED, JsonOption, bench_app, bench_engine, ratios_of, write_rows
from lmcache_rag.errors import CorpusError
from lmcache_rag.request import BlendOptions
from lmcache_rag.terminal import CodecOption, DtypeOption, ModelOption, ThreadsOption, err, given, out, show_rows


@bench_app.command("answers")
def bench_answers_command(
    corpus: Annotated[Path, typer.Option(help="Documents, as for `index`.")],
    questions: Annotated[Path, typer.Option(help="JSON list of objects with `question` and `expected`.")],
    limit: Annotated[Optional[int], typer.Option(min=1, help="Ask the first so many; all else.")] = None,
    ratios: Annotated[
        str, typer.Option(help="Recompute ratios, separated by commas, besides the default target.")
    ] = "0.05,0.15,0.25,0.4",
    passages: Annotated[int, typer.Option(min=1, help="Passages per prompt.")] = 5,
    chunk_tokens: Annotated[int, typer.Option(min=32, help="Tokens per passage.")] = 350,
    wrong: Annotated[bool, typer.Option(help="Ask blends also what plain prefill answers wrong.")] = True,
    json_file: JsonOption = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """How many answers that plain prefill gets right stay right with blending."""
    from lmcache_rag.bench.answers import bench_answers, read_expected
    from lmcache_rag.corpus import IndexSettings, open_corpus

    asked = read_expected(questions, limit)
    tried = {"default": BlendOptions(), **{f"r={ratio:g}": BlendOptions(ratio=ratio) for ratio in ratios_of(ratios)}}
    settings = IndexSettings.checked(chunk_tokens=chunk_tokens, **given(model=model))
    options = given(codec=codec, dtype=dtype, threads=threads)
    with (
        tempfile.TemporaryDirectory(prefix="lmcache-rag-bench-") as folder,
        err.status("Starting vLLM") as status,
        open_corpus(Path(folder), settings, create=True, **MEASURED, **options) as (engine, opened),
    ):
        status.update("ingest")
        if not opened.update(opened.plan_update([corpus])).chunks_computed:
            raise CorpusError(f"--corpus: {corpus} has no text.")
        rows = bench_answers(engine, opened, asked, tried, passages=passages, wrong=wrong, progress=status.update)
        out.print(f"{engine.settings.model}, {engine.dtype}, {engine.threads} threads")
    show_rows(rows)
    write_rows(rows, json_file)


@bench_app.command("frameworks")
def bench_frameworks_command(
    chunk_tokens: Annotated[int, typer.Option(min=64, help="Tokens per passage, five in a prompt.")] = 300,
    questions: Annotated[int, typer.Option(min=1, help="Questions per application.")] = 3,
    apps: Annotated[str, typer.Option(help="Only applications that have this in their name.")] = "",
    json_file: JsonOption = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """TTFT of applications of LlamaIndex and LangChain, against the same with plain prefill."""
    from lmcache_rag.bench.frameworks import bench_frameworks

    with bench_engine(model=model, codec=codec, dtype=dtype, threads=threads) as (engine, progress):
        rows = bench_frameworks(engine, chunk_tokens=chunk_tokens, questions=questions, named=apps, progress=progress)
    show_rows(rows)
    write_rows(rows, json_file)


@bench_app.command("peers")
def bench_peers_command(
    passages: Annotated[int, typer.Option(min=1, help="Passages per prompt.")] = 5,
    passage_tokens: Annotated[int, typer.Option(min=32, help="Tokens per passage.")] = 300,
    questions: Annotated[int, typer.Option(min=1, help="Prompts, over passages of their own each.")] = 3,
    json_file: JsonOption = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    threads: ThreadsOption = None,
) -> None:
    """TTFT, fidelity and bytes beside vLLM's prefix cache and kvboost's chunk cache, on the same prompts."""
    from lmcache_rag.bench.peers import STRATEGIES, Blending, KVBoost, Peer, PrefixCache, bench_peers
    from lmcache_rag.vllm.worker import bound_model

    own = {"never_slower": True, "model": model, "codec": codec, "threads": threads}
    with bench_engine(**own, dtype="float32") as (engine, progress):
        raw = bound_model().shape.bytes_per_token
        peers: list[Peer] = [
            PrefixCache(engine, raw),
            Blending(engine, engine.kv_bytes_per_token),
            *(KVBoost(engine, strategy, raw) for strategy in STRATEGIES),
        ]
        rows = bench_peers(
            engine, peers, passages=passages, passage_tokens=passage_tokens, questions=questions, progress=progress
        )
    show_rows(rows)
    write_rows(rows, json_file)
