"""The command line of what measures: `lmcache-rag bench` and `calibrate`."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lmcache_rag.blobs.throttled import Throttle
from lmcache_rag.codec import CODECS
from lmcache_rag.engine.settings import EngineSettings
from lmcache_rag.errors import LmcacheRagError, PromptError
from lmcache_rag.request import DEFAULT_SELECTOR, DEFAULT_TARGET_KL, BlendOptions, SelectorName
from lmcache_rag.terminal import CodecOption, DtypeOption, ModelOption, ThreadsOption, err, given, out, show_rows

if TYPE_CHECKING:
    from lmcache_rag.engine import LocalEngine

bench_app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")

JsonOption = Annotated[Optional[Path], typer.Option("--json", help="Write the rows to this file.")]
SelectorsOption = Annotated[str, typer.Option(help="Selectors, separated by commas; `default` is one.")]

_LEAST = 0.001
"""Of bandwidths and goals, which none may be zero."""

MEASURED = {"never_slower": False, "refine": "off", "learn": "off", "hot_bytes": 0}
"""What is measured is one blend of KV that is read, whatever else would be faster."""

_AS_USED = {"never_slower": True, "refine": "idle"}


def calibrate(
    data: Annotated[
        Optional[Path], typer.Option(help="Questions like yours, in the form of `bench fidelity`; built-in ones else.")
    ] = None,
    questions: Annotated[int, typer.Option(min=4, help="How many are asked.")] = 16,
    calibration: Annotated[
        Optional[Path], typer.Option(help="Text like yours, to learn the KV codec from; a built-in one else.")
    ] = None,
    store: Annotated[
        Optional[str], typer.Option(help="Folder or URI of a store that is to use the learned codec from now on.")
    ] = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Learn a model's KV codec, and measure which recompute ratio it needs for which fidelity, once per model."""
    from lmcache_rag.bench.calibrate import BUILT_IN_MARGIN, default_questions
    from lmcache_rag.bench.calibrate import calibrate as measure
    from lmcache_rag.bench.questions import read_questions
    from lmcache_rag.blobs.uri import open_store
    from lmcache_rag.learn.texts import built_in_texts, read_texts
    from lmcache_rag.library.tables import TableStore
    from lmcache_rag.model import cache_folder
    from lmcache_rag.prompt import model_format

    if data is None:
        asked, margin = default_questions(questions), BUILT_IN_MARGIN
    else:
        margin = 1.0
        asked = read_questions(data, passages=4, words=150, limit=questions)
    texts = built_in_texts() if calibration is None else read_texts(calibration)
    kept = None if store is None else open_store(store)
    with bench_engine(model=model, codec=codec, dtype=dtype, threads=threads) as (engine, progress):
        if CODECS[engine.settings.codec].learned:
            tables = engine.codec.learn(engine.codec.prompts(texts), progress)
            engine.codec.keep(tables)
            if kept is not None:
                TableStore(kept, engine.model_fingerprint).add(tables)
        curve = measure(engine, model_format(engine.tokenizer), asked, margin, progress)
        path = curve.write(cache_folder(), engine.model_fingerprint, engine.settings.codec)
    show_rows([{"ratio": ratio, "kl_mean": kl} for ratio, kl in curve.points])
    ratio = curve.ratio_for(DEFAULT_TARGET_KL)
    out.print(f"The default target, {DEFAULT_TARGET_KL}, takes r={ratio:g}. Kept in {path}")


@bench_app.command("ttft")
def bench_ttft_command(
    chunks: Annotated[int, typer.Option(min=1, help="Chunks in the prompt.")] = 5,
    chunk_tokens: Annotated[int, typer.Option(min=32, help="Tokens per chunk.")] = 580,
    ratios: Annotated[str, typer.Option(help="Recompute ratios, separated by commas.")] = "0.05,0.15",
    selectors: SelectorsOption = "default",
    repeat: Annotated[int, typer.Option(min=1, help="Measurements per row; their median is given.")] = 5,
    store_mb_s: Annotated[
        Optional[float],
        typer.Option(min=_LEAST, help="Slow the store down to so many MB/s, to see what a slow one does."),
    ] = None,
    json_file: JsonOption = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """TTFT of full prefill, prefix cache, plain reuse and blending, and the cost of ingest."""
    from lmcache_rag.bench.ttft import bench_ttft

    slow = {} if store_mb_s is None else {"throttle": Throttle(1e6 * store_mb_s), "never_slower": True}
    with bench_engine(**slow, model=model, codec=codec, dtype=dtype, threads=threads) as (engine, progress):
        rows = bench_ttft(
            engine,
            chunks=chunks,
            chunk_tokens=chunk_tokens,
            ratios=ratios_of(ratios),
            selectors=_selectors(selectors),
            repeat=repeat,
            must_reuse=store_mb_s is None,
            progress=progress,
        )
    show_rows(rows[:-1])
    show_rows(rows[-1:])
    write_rows(rows, json_file)


@bench_app.command("chat")
def bench_chat_command(
    data: Annotated[
        Optional[Path], typer.Option(help="Questions, in the form of `bench fidelity`; built-in ones else.")
    ] = None,
    turns: Annotated[int, typer.Option(min=2, help="Turns per conversation.")] = 6,
    passages: Annotated[int, typer.Option(min=1, help="Passages per prompt.")] = 5,
    words: Annotated[int, typer.Option(min=16, help="Words per passage.")] = 150,
    conversations: Annotated[int, typer.Option(min=1, help="Conversations per workload.")] = 5,
    workloads: Annotated[
        str,
        typer.Option(help="Some of same_passages, growing_chat, new_passages, more_passages, second_engine."),
    ] = "same_passages,growing_chat,new_passages,more_passages,second_engine",
    idle: Annotated[str, typer.Option(help="Seconds between turns, separated by commas.")] = "5,0",
    json_file: JsonOption = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """TTFT of each turn of conversations, and of further questions over the same passages, against vLLM's own prefix
    cache."""
    from lmcache_rag.bench.calibrate import default_questions
    from lmcache_rag.bench.chat import STORED, WORKLOADS, bench_chat, conversation
    from lmcache_rag.bench.questions import read_questions
    from lmcache_rag.bench.second import SecondEngine
    from lmcache_rag.prompt import completion_format

    chosen = [name.strip() for name in workloads.split(",")]
    unknown = sorted(set(chosen) - set(WORKLOADS))
    if unknown:
        raise PromptError(f"--workloads: there is no {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    idle_s = _seconds("idle", idle)
    needed = conversations * turns
    if data is None:
        asked = default_questions(needed, passages=passages, words=words)
    else:
        asked = read_questions(data, passages=passages, words=words, limit=needed)
    form = completion_format()
    with bench_engine(
        **_AS_USED,
        conversations="stored" if STORED & set(chosen) else "local",
        kv_cache_bytes=3 << 30,
        model=model,
        codec=codec,
        dtype=dtype,
        threads=threads,
    ) as (
        engine,
        progress,
    ):
        told = [
            conversation(engine, form, asked[number * turns :][:turns] or asked, turns, number)
            for number in range(conversations)
        ]
        two = "second_engine" in chosen
        with SecondEngine(engine.settings) if two else nullcontext() as second:
            rows = bench_chat(engine, form, told, workloads=chosen, idle_s=idle_s, progress=progress, second=second)
    show_rows(rows)
    write_rows(rows, json_file)


@bench_app.command("throughput")
def bench_throughput_command(
    concurrency: Annotated[str, typer.Option(help="Requests at a time, separated by commas.")] = "1,4,8",
    requests: Annotated[int, typer.Option(min=1, help="Requests per row.")] = 24,
    pool: Annotated[int, typer.Option(min=1, help="Passages that questions are asked over.")] = 24,
    passages: Annotated[int, typer.Option(min=1, help="Passages per question.")] = 5,
    passage_tokens: Annotated[int, typer.Option(min=32, help="Tokens per passage.")] = 300,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the choice of passages.")] = 0,
    max_num_batched_tokens: Annotated[
        Optional[int], typer.Option(min=16, help="Tokens per step, in all modes; vLLM's own choice else.")
    ] = None,
    json_file: JsonOption = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Requests per second and latency of full prefill, prefix cache and blending, several requests at a time."""
    from lmcache_rag.bench.throughput import bench_throughput

    if passages > pool:
        raise PromptError(f"A question over {passages} passages needs a pool of as many, not {pool}.")
    counts = _counts("concurrency", concurrency)
    with bench_engine(
        never_slower=True,
        max_num_batched_tokens=max_num_batched_tokens,
        model=model,
        codec=codec,
        dtype=dtype,
        threads=threads,
    ) as (engine, progress):
        rows = bench_throughput(
            engine,
            concurrency=counts,
            requests=requests,
            pool=pool,
            passages=passages,
            passage_tokens=passage_tokens,
            answer_tokens=answer_tokens,
            seed=seed,
            progress=progress,
        )
    show_rows(rows)
    write_rows(rows, json_file)


@bench_app.command("fidelity")
def bench_fidelity_command(
    data: Annotated[Path, typer.Option(help="JSON list of objects with `question`, `answers` and `ctxs`.")],
    passages: Annotated[int, typer.Option(min=1, help="Passages per question.")] = 4,
    words: Annotated[int, typer.Option(min=8, help="Words per passage.")] = 150,
    limit: Annotated[int, typer.Option(min=1, help="Ask the first so many questions.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the order of ingest.")] = 0,
    selectors: SelectorsOption = "default",
    ratios: Annotated[str, typer.Option(help="Recompute ratios, separated by commas.")] = "0.05,0.1,0.15",
    json_file: JsonOption = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """How near blending comes to full prefill on real questions: KL divergence, agreement, and answers."""
    from lmcache_rag.bench.fidelity import bench_fidelity, ways
    from lmcache_rag.bench.questions import read_questions
    from lmcache_rag.prompt import model_format

    questions = read_questions(data, passages=passages, words=words, limit=limit)
    tried = ways(_selectors(selectors), ratios_of(ratios))
    with bench_engine(model=model, codec=codec, dtype=dtype, threads=threads) as (engine, progress):
        rows = bench_fidelity(engine, model_format(engine.tokenizer), questions, tried, seed=seed, progress=progress)
    show_rows(rows)
    write_rows(rows, json_file)


@bench_app.command("streaming")
def bench_streaming_command(
    chunks: Annotated[int, typer.Option(min=3, help="Chunks in the prompt.")] = 8,
    chunk_tokens: Annotated[int, typer.Option(min=32, help="Tokens per chunk.")] = 360,
    goal_s: Annotated[float, typer.Option(min=_LEAST, help="TTFT goal in seconds.")] = 1.0,
    fast_mb_s: Annotated[float, typer.Option(min=_LEAST, help="The store's bandwidth at first, MB/s.")] = 50.0,
    slow_mb_s: Annotated[
        float, typer.Option(min=_LEAST, help="Its bandwidth after a quarter of the chunks, MB/s.")
    ] = 8.0,
    extra_codecs: Annotated[str, typer.Option(help="Stored besides --codec, separated by commas.")] = "high,small",
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Recompute ratio.")] = 0.05,
    repeat: Annotated[int, typer.Option(min=1, help="Measurements per row; their median is given.")] = 5,
    json_file: JsonOption = None,
    model: ModelOption = None,
    codec: CodecOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """TTFT with a goal where the store becomes slow in the middle of a request: codecs chosen per chunk or not."""
    from lmcache_rag.bench.streaming import bench_streaming, ingest_stream, prompt_to_stream
    from lmcache_rag.engine import LocalEngine

    options = given(model=model, codec=codec, dtype=dtype, threads=threads)
    extra = tuple(name.strip() for name in extra_codecs.split(","))
    rows = []
    with bench_engine(extra_codecs=extra, **options) as (engine, progress):
        settings = engine.settings
        plan = prompt_to_stream(engine, chunks, chunk_tokens)
        chunk_bytes = ingest_stream(engine, plan)
        engine.close()
        fast, slow = 1e6 * fast_mb_s, 1e6 * slow_mb_s
        throttles = {
            f"{fast_mb_s:g} MB/s": Throttle(fast),
            f"{fast_mb_s:g}, then {slow_mb_s:g} MB/s": Throttle(fast, slow, chunks // 4 * chunk_bytes),
            f"{slow_mb_s:g} MB/s": Throttle(slow),
        }
        for name, throttle in throttles.items():
            with LocalEngine(settings.model_copy(update={"throttle": throttle})) as throttled:
                rows += bench_streaming(
                    throttled, plan, goal_s=goal_s, ratio=ratio, repeat=repeat, bandwidth=name, progress=progress
                )
    show_rows(rows)
    write_rows(rows, json_file)


@bench_app.command("codec")
def bench_codec_command(
    data: Annotated[Path, typer.Option(help="JSON list of objects with `question`, `answers` and `ctxs`.")],
    calibration: Annotated[
        Optional[Path], typer.Option(help="Text to learn the tables from, not that of --data; a built-in one else.")
    ] = None,
    codecs: Annotated[str, typer.Option(help="Codecs, separated by commas.")] = ",".join(CODECS),
    chunk_tokens: Annotated[str, typer.Option(help="Tokens per chunk, separated by commas.")] = "16,64,256,1024",
    passages: Annotated[int, typer.Option(min=1, help="Passages per question.")] = 4,
    words: Annotated[int, typer.Option(min=8, help="Words per passage.")] = 150,
    limit: Annotated[int, typer.Option(min=1, help="Ask the first so many questions.")] = 40,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for coding.")] = 1,
    json_file: JsonOption = None,
    model: ModelOption = None,
) -> None:
    """What each codec makes of real KV: bytes, speed, and how far its errors move what the model says."""
    from lmcache_rag.bench.codec import CodecBench
    from lmcache_rag.bench.questions import read_questions
    from lmcache_rag.learn.texts import built_in_texts, read_texts
    from lmcache_rag.prompt import model_format
    from lmcache_rag.vllm.worker import bound_model

    questions = read_questions(data, passages=passages, words=words, limit=limit)
    chosen = [EngineSettings.checked(codec=name.strip()).codec for name in codecs.split(",")]
    sizes = _counts("chunk-tokens", chunk_tokens)
    texts = built_in_texts() if calibration is None else read_texts(calibration)
    with bench_engine(model=model, dtype="float32") as (engine, progress):
        rotations = [spec.rotation for spec in bound_model().specs]
        tables = engine.codec.learn(engine.codec.prompts(texts), progress)
        bench = CodecBench(engine.model_folder, rotations, tables, codecs=chosen, sizes=sizes, threads=threads)
        rows = bench.rows(engine.tokenizer, model_format(engine.tokenizer), questions, progress)
    show_rows(rows)
    write_rows(rows, json_file)


@contextmanager
def bench_engine(**settings: Any) -> Iterator[tuple[LocalEngine, Callable[[str], Any]]]:
    """An engine with a store of its own, deleted at the end, and what shows how far a measurement is. It loads also
    where computing would be faster, so that it is blending that is measured."""
    from lmcache_rag.engine import EngineSettings, LocalEngine

    with tempfile.TemporaryDirectory(prefix="lmcache-rag-bench-") as store:
        checked = EngineSettings.checked(**{"store": store, "forced_answers": True, **MEASURED, **given(**settings)})
        with err.status("Starting vLLM") as status, LocalEngine(checked) as engine:
            yield engine, status.update
            out.print(f"{engine.settings.model}, {engine.dtype}, {engine.threads} threads")


def _counts(option: str, values: str) -> list[int]:
    """Numbers named in an option."""
    try:
        counts = [int(value) for value in values.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise PromptError(f"{option}: give numbers from 1 on, separated by commas (got {values!r})")
    return counts


def _seconds(option: str, values: str) -> list[float]:
    """Durations named in an option."""
    try:
        seconds = [float(value) for value in values.split(",")]
    except ValueError:
        seconds = [-1.0]
    if not all(0 <= value < math.inf for value in seconds):
        raise PromptError(f"{option}: give seconds from 0 on, separated by commas (got {values!r})")
    return seconds


def _selectors(names: str) -> list[SelectorName]:
    """Selectors named in an option, each once."""
    named = [DEFAULT_SELECTOR if name.strip() == "default" else name.strip() for name in names.split(",")]
    return list(dict.fromkeys(BlendOptions.checked(selector=name).selector for name in named))


def ratios_of(values: str) -> list[float]:
    """Recompute ratios named in an option, ascending."""
    return sorted({BlendOptions.checked(ratio=value.strip()).ratio or 0.0 for value in values.split(",")})


def write_rows(rows: list[dict[str, Any]], json_file: Path | None) -> None:
    """Write the rows of a benchmark as JSON, if a file was named."""
    if json_file is None:
        return
    try:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")
    except OSError as error:
        raise LmcacheRagError(f"{json_file} cannot be written ({error.strerror}): the figures are above.") from error
