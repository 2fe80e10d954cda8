"""The command line: `lmcache-rag index`, `ask`, `calibrate` and `bench`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lmcache_rag import __version__
from lmcache_rag.errors import LmcacheRagError, PromptError
from lmcache_rag.vllm.request import DEFAULT_SELECTOR, DEFAULT_TARGET_KL, BlendOptions, ReuseReport, SelectorName

if TYPE_CHECKING:
    from lmcache_rag.engine import LocalEngine
    from lmcache_rag.prompt import PromptFormat

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="RAG on vLLM in which the model reads each document once."
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
app.add_typer(bench_app, name="bench")

out = Console()
err = Console(stderr=True)

IndexOption = Annotated[Path, typer.Option("--index", help="Folder of the index.")]
ThreadsOption = Annotated[Optional[int], typer.Option(help="CPU threads; all cores by default.")]
ModelOption = Annotated[
    Optional[str], typer.Option(help="Hugging Face id or folder; SmolLM2-135M-Instruct by default.")
]
DtypeOption = Annotated[Optional[str], typer.Option(help="Compute type: auto, float32, bfloat16, float16.")]
SelectorOption = Annotated[str, typer.Option(help=f"Which tokens to recompute: {', '.join(get_args(SelectorName))}.")]
SelectorsOption = Annotated[str, typer.Option(help="Selectors, separated by commas; `default` is one.")]
_MEASURED = {"forced_answers": True, "never_slower": False}
DEFAULT_INDEX = Path(".lmcache-rag")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        out.print(f"lmcache-rag {__version__}")
        raise typer.Exit


@app.command()
def index(
    paths: Annotated[list[Path], typer.Argument(help="Text and Markdown files, or folders of them.")],
    folder: IndexOption = DEFAULT_INDEX,
    model: ModelOption = None,
    store: Annotated[Optional[Path], typer.Option(help="Folder of the KV store; within the index by default.")] = None,
    namespace: Annotated[Optional[str], typer.Option(help="KV is never shared between namespaces.")] = None,
    chunk_tokens: Annotated[Optional[int], typer.Option(help="Longest passage, in tokens; 512 by default.")] = None,
    overlap_tokens: Annotated[Optional[int], typer.Option(help="Tokens shared by neighbouring passages; 0.")] = None,
    embedding_model: Annotated[Optional[str], typer.Option(help="For finding passages; all-MiniLM-L6-v2.")] = None,
    prompt: Annotated[Optional[str], typer.Option(help="Form of the prompt: completion (default) or chat.")] = None,
    primer: Annotated[
        Optional[Path],
        typer.Option(help="File of passages to use as primer, in place of some of the documents; /dev/null for none."),
    ] = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Index documents: find passages, compute the KV of each once, and store it. Run again, it does what changed."""
    from lmcache_rag.corpus import IndexSettings, Manifest, find_files, open_corpus, updating

    settings = IndexSettings.checked(
        model=model,
        store=store,
        namespace=namespace,
        chunk_tokens=chunk_tokens,
        overlap_tokens=overlap_tokens,
        embedding_model=embedding_model,
        prompt=prompt,
        primer=None if primer is None else _text_of(primer),
    )
    if Manifest.read(folder) is None:
        find_files(paths)  # fails before anything is started or made
    try:
        with (
            updating(folder),
            err.status("Starting vLLM") as status,
            open_corpus(folder, settings, create=True, **_given(dtype=dtype, threads=threads)) as (_, corpus),
        ):
            status.stop()
            plan = corpus.plan_update(paths)
            free = "" if plan.free_bytes is None else f", {plan.free_bytes / 1e9:.1f} GB free"
            err.print(
                f"{len(plan.pending)} new or changed, {len(plan.removed)} gone, {plan.report.unchanged} unchanged: "
                f"{plan.tokens} tokens to read, up to {plan.needed_bytes / 1e9:.2f} GB of KV{free}"
            )
            with _progress() as progress:
                task = progress.add_task("tokens", total=plan.tokens)
                report = corpus.update(plan, lambda tokens: progress.advance(task, tokens))
    except KeyboardInterrupt:
        err.print("Interrupted: what was done so far is kept. Run the command again to go on.")
        raise typer.Exit(130) from None
    if report.restored:
        err.print(f"{report.restored} of the changed ones had lost KV in the store, which was computed again")
    rate = f", {report.tokens_computed / report.seconds:.0f} tokens/s" if report.tokens_computed else ""
    out.print(
        f"{report.added} added, {report.changed} changed, {report.removed} removed, {report.unchanged} unchanged; "
        f"{report.chunks_computed} passages computed{rate}, {report.chunks_present} present already, "
        f"{report.bytes_stored / 1e6:.0f} MB stored in {corpus.manifest.store_folder(folder)}"
    )
    for problem in report.refused:
        err.print(f"[red]left out:[/red] {problem}", highlight=False)
    if report.refused:
        raise typer.Exit(1)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    folder: IndexOption = DEFAULT_INDEX,
    model: ModelOption = None,
    passages: Annotated[int, typer.Option("--passages", "-k", min=1, help="How many passages to answer from.")] = 5,
    selector: SelectorOption = DEFAULT_SELECTOR,
    target_kl: Annotated[
        float, typer.Option(help="How far from full prefill answers may be: mean KL divergence, as calibrated.")
    ] = DEFAULT_TARGET_KL,
    ratio: Annotated[
        Optional[float], typer.Option(help="Share of the passages' tokens to recompute, 0 to 1, instead of a target.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer with plain prefill, and show both.")] = False,
    off: Annotated[bool, typer.Option("--off", help="Answer with plain prefill only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Answer a question from the indexed documents, with their stored KV."""
    from lmcache_rag.corpus import IndexSettings, open_corpus
    from lmcache_rag.engine import Sampling

    if not question.strip():
        raise PromptError("The question is empty.")
    options = BlendOptions.checked(mode="off" if off else "blend", selector=selector, target_kl=target_kl, ratio=ratio)
    with (
        err.status("Starting vLLM") as status,
        open_corpus(folder, IndexSettings.checked(model=model), **_given(dtype=dtype, threads=threads)) as (
            engine,
            corpus,
        ),
    ):
        hits = corpus.search(question, passages)
        plan = corpus.prompt(question, hits)
        sampling = Sampling(max_tokens=max_tokens, stop=corpus.manifest.prompt.stop)
        engine.generate(plan.token_ids[:64], Sampling(max_tokens=1), BlendOptions(mode="off"))  # first-time costs
        status.stop()
        for delta in engine.stream(plan, sampling, options, cache_salt="blended"):
            if not as_json:
                out.print(delta.text, end="", markup=False, highlight=False)
            answer = delta.completion
        assert answer is not None
        plain = engine.generate(plan, sampling, BlendOptions(mode="off"), cache_salt="plain") if compare else None
    if as_json:
        result: dict[str, Any] = {
            "answer": answer.text.strip(),
            "sources": [{"path": hit.path, "text": hit.text, "score": round(hit.score, 4)} for hit in hits],
            "reuse": answer.reuse.model_dump(),
            "ttft_s": round(answer.ttft_s, 4),
        }
        if plain is not None:
            result["plain"] = {"answer": plain.text.strip(), "ttft_s": round(plain.ttft_s, 4)}
        print(json.dumps(result, indent=2))
        return
    out.print("\n")
    for number, hit in enumerate(hits, start=1):
        out.print(f"[dim]{number}. {hit.path}: {' '.join(hit.text.split())[:100]}...[/dim]", highlight=False)
    out.print(f"\n{describe(answer.reuse)}\nTTFT {answer.ttft_s:.3f} s", highlight=False)
    if plain is not None:
        out.print(
            f"\nPlain prefill: {plain.text.strip()}\nTTFT {plain.ttft_s:.3f} s, "
            f"{plain.ttft_s / answer.ttft_s:.1f}x that of the blended answer",
            markup=False,
            highlight=False,
        )


@app.command()
def calibrate(
    data: Annotated[
        Optional[Path], typer.Option(help="Questions like yours, in the form of `bench fidelity`; built-in ones else.")
    ] = None,
    questions: Annotated[int, typer.Option(min=4, help="How many are asked.")] = 16,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure which recompute ratio a model needs for which fidelity, in minutes, once per model."""
    from lmcache_rag.bench.calibrate import BUILT_IN_MARGIN, default_questions
    from lmcache_rag.bench.calibrate import calibrate as measure
    from lmcache_rag.bench.questions import read_questions
    from lmcache_rag.model import cache_folder

    if data is None:
        asked, margin = default_questions(questions), BUILT_IN_MARGIN
    else:
        margin = 1.0
        asked = read_questions(data, passages=4, words=150, limit=questions)
    with _bench_engine(model=model, dtype=dtype, threads=threads) as (engine, progress):
        calibration = measure(engine, _prompt_form(engine), asked, margin, progress)
        path = calibration.write(cache_folder(), engine.model_fingerprint)
    _print_table([{"ratio": ratio, "kl_mean": kl} for ratio, kl in calibration.points])
    ratio = calibration.ratio_for(DEFAULT_TARGET_KL)
    out.print(f"The default target, {DEFAULT_TARGET_KL}, takes r={ratio:g}. Kept in {path}", highlight=False)


@bench_app.command("ttft")
def bench_ttft_command(
    chunks: Annotated[int, typer.Option(min=1, help="Chunks in the prompt.")] = 5,
    chunk_tokens: Annotated[int, typer.Option(min=32, help="Tokens per chunk.")] = 580,
    ratios: Annotated[str, typer.Option(help="Recompute ratios, separated by commas.")] = "0.05,0.15",
    selectors: SelectorsOption = "default",
    repeat: Annotated[int, typer.Option(min=1, help="Measurements per row; their median is given.")] = 5,
    store_mb_s: Annotated[
        Optional[float], typer.Option(help="Slow the store down to so many MB/s, to see what a slow one does.")
    ] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the rows to this file.")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """TTFT of full prefill, prefix cache, plain reuse and blending, and the cost of ingest."""
    from lmcache_rag.bench.ttft import bench_ttft

    slow = {} if store_mb_s is None else {"read_bytes_per_s": 1e6 * store_mb_s, "never_slower": True}
    with _bench_engine(**slow, model=model, dtype=dtype, threads=threads) as (engine, progress):
        rows = bench_ttft(
            engine,
            chunks=chunks,
            chunk_tokens=chunk_tokens,
            ratios=_ratios(ratios),
            selectors=_selectors(selectors),
            repeat=repeat,
            must_reuse=store_mb_s is None,
            progress=progress,
        )
    _print_rows(rows)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


@bench_app.command("throughput")
def bench_throughput_command(
    concurrency: Annotated[str, typer.Option(help="Requests at a time, separated by commas.")] = "1,4,8",
    requests: Annotated[int, typer.Option(min=1, help="Requests per row.")] = 24,
    pool: Annotated[int, typer.Option(min=1, help="Passages that questions are asked over.")] = 24,
    passages: Annotated[int, typer.Option(min=1, help="Passages per question.")] = 5,
    passage_tokens: Annotated[int, typer.Option(min=32, help="Tokens per passage.")] = 300,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the choice of passages.")] = 0,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the rows to this file.")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Requests per second and latency of full prefill, prefix cache and blending, several requests at a time."""
    from lmcache_rag.bench.throughput import bench_throughput

    if passages > pool:
        raise PromptError(f"A question over {passages} passages needs a pool of as many, not {pool}.")
    try:
        levels = [int(level) for level in concurrency.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise PromptError(f"concurrency: give numbers from 1 on, separated by commas (got {concurrency!r})")
    with _bench_engine(model=model, dtype=dtype, threads=threads) as (engine, progress):
        rows = bench_throughput(
            engine,
            concurrency=levels,
            requests=requests,
            pool=pool,
            passages=passages,
            passage_tokens=passage_tokens,
            answer_tokens=answer_tokens,
            seed=seed,
            progress=progress,
        )
    _print_table(rows)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


@bench_app.command("fidelity")
def bench_fidelity_command(
    data: Annotated[Path, typer.Option(help="JSON list of objects with `question`, `answers` and `ctxs`.")],
    passages: Annotated[int, typer.Option(min=1, help="Passages per question.")] = 4,
    words: Annotated[int, typer.Option(min=8, help="Words per passage.")] = 150,
    limit: Annotated[int, typer.Option(min=1, help="Ask the first so many questions.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the order of ingest.")] = 0,
    selectors: SelectorsOption = "default",
    ratios: Annotated[str, typer.Option(help="Recompute ratios, separated by commas.")] = "0.05,0.1,0.15",
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the rows to this file.")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """How near blending comes to full prefill on real questions: KL divergence, agreement, and answers."""
    from lmcache_rag.bench.fidelity import bench_fidelity, ways
    from lmcache_rag.bench.questions import read_questions

    questions = read_questions(data, passages=passages, words=words, limit=limit)
    tried = ways(_selectors(selectors), _ratios(ratios))
    with _bench_engine(model=model, dtype=dtype, threads=threads) as (engine, progress):
        rows = bench_fidelity(engine, _prompt_form(engine), questions, tried, seed=seed, progress=progress)
    _print_table(rows)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


def describe(reuse: ReuseReport) -> str:
    """A reuse report in a sentence."""
    if reuse.mode in ("off", "plain"):
        return f"{reuse.prompt_tokens} prompt tokens, all by plain prefill ({reuse.reason})"
    parts = [
        f"{reuse.reused_tokens} reused",
        f"{reuse.recomputed_tokens} recomputed ({reuse.selector}, r={reuse.ratio:g})",
        f"{reuse.missed_tokens} missed" + "".join(f", {tokens} {why}" for why, tokens in reuse.misses.items()),
        f"{reuse.unknown_tokens + reuse.vllm_tokens} new",
    ]
    if reuse.local_tokens:
        parts.append(f"{reuse.local_tokens} in the prefix cache")
    phases = ", ".join(f"{phase} {1000 * seconds:.0f} ms" for phase, seconds in reuse.phases_s.items())
    return (
        f"{reuse.prompt_tokens} prompt tokens: {', '.join(parts)}; {reuse.bytes_loaded / 1e6:.1f} MB loaded ({phases})"
    )


def main() -> None:
    """Entry point: an error that the user can mend is one sentence and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(standalone_mode=True)
    except LmcacheRagError as error:
        err.print(f"[bold red]error:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


@contextmanager
def _bench_engine(**given: Any) -> Iterator[tuple[LocalEngine, Callable[[str], Any]]]:
    """An engine with a store of its own, deleted at the end, and what shows how far a measurement is. It loads also
    where computing would be faster, so that it is blending that is measured."""
    from lmcache_rag.engine import EngineSettings, LocalEngine

    with tempfile.TemporaryDirectory(prefix="lmcache-rag-bench-") as store:
        settings = EngineSettings.checked(**{"store": store, **_MEASURED, **_given(**given)})
        with err.status("Starting vLLM") as status, LocalEngine(settings) as engine:
            yield engine, status.update
            out.print(f"{engine.settings.model}, {engine.dtype}, {engine.threads} threads", highlight=False)


def _prompt_form(engine: LocalEngine) -> PromptFormat:
    """The model's own chat template; plain completion where it has none."""
    from lmcache_rag.prompt import chat_format, completion_format

    try:
        return chat_format(engine.tokenizer)
    except PromptError:
        return completion_format()


def _selectors(names: str) -> list[SelectorName]:
    """Selectors named in an option, each once."""
    named = [DEFAULT_SELECTOR if name.strip() == "default" else name.strip() for name in names.split(",")]
    return list(dict.fromkeys(BlendOptions.checked(selector=name).selector for name in named))


def _ratios(values: str) -> list[float]:
    """Recompute ratios named in an option, ascending."""
    return sorted({BlendOptions.checked(ratio=value.strip()).ratio or 0.0 for value in values.split(",")})


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read as text ({error}): name a UTF-8 file.") from error


def _given(**values: Any) -> dict[str, Any]:
    """The options that were given; the environment and the defaults decide the others."""
    return {name: value for name, value in values.items() if value is not None}


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err
    )


def _print_rows(rows: list[dict[str, Any]]) -> None:
    _print_table(rows[:-1])
    _print_table(rows[-1:])


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    out.print(table)
