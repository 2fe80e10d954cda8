"""The command line: `lmcache-rag index`, `ask`, `serve`, `calibrate` and `bench`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer

from lmcache_rag import __version__
from lmcache_rag.bench import store_commands  # noqa: F401  # adds its commands to the others
from lmcache_rag.bench.commands import bench_app, calibrate
from lmcache_rag.corpus import commands  # noqa: F401  # the same
from lmcache_rag.errors import LmcacheRagError, PromptError
from lmcache_rag.library.commands import store_app
from lmcache_rag.request import DEFAULT_SELECTOR, DEFAULT_TARGET_KL, BlendOptions, ReuseReport, SelectorName
from lmcache_rag.serving import serve
from lmcache_rag.terminal import (
    CapacityOption,
    CodecOption,
    DtypeOption,
    ModelOption,
    ThreadsOption,
    TiersOption,
    encode_anything,
    err,
    given,
    out,
)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="RAG on vLLM in which the model reads each document once."
)
app.add_typer(bench_app, name="bench")
app.add_typer(store_app, name="store")
app.command()(calibrate)
app.command(context_settings={"ignore_unknown_options": True})(serve)

IndexOption = Annotated[Path, typer.Option("--index", help="Folder of the index.")]
SelectorOption = Annotated[str, typer.Option(help=f"Which tokens to recompute: {', '.join(get_args(SelectorName))}.")]
DEFAULT_INDEX = Path(".lmcache-rag")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    encode_anything()
    if version:
        out.print(f"lmcache-rag {__version__}")
        raise typer.Exit


@app.command()
def index(
    paths: Annotated[list[Path], typer.Argument(help="Text and Markdown files, or folders of them.")],
    folder: IndexOption = DEFAULT_INDEX,
    model: ModelOption = None,
    store: Annotated[
        Optional[str],
        typer.Option(help="Folder or URI (s3://bucket/kv) of the KV store; within the index by default."),
    ] = None,
    tiers: TiersOption = None,
    namespace: Annotated[Optional[str], typer.Option(help="KV is never shared between namespaces.")] = None,
    chunk_tokens: Annotated[Optional[int], typer.Option(help="Longest passage, in tokens; 512 by default.")] = None,
    overlap_tokens: Annotated[Optional[int], typer.Option(help="Tokens shared by neighbouring passages; 0.")] = None,
    embedding_model: Annotated[Optional[str], typer.Option(help="For finding passages; all-MiniLM-L6-v2.")] = None,
    prompt: Annotated[Optional[str], typer.Option(help="Form of the prompt: completion (default) or chat.")] = None,
    primer: Annotated[
        Optional[Path],
        typer.Option(help="File of passages to use as primer, in place of some of the documents; /dev/null for none."),
    ] = None,
    codec: CodecOption = None,
    capacity: CapacityOption = None,
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
    engine = given(codec=codec, capacity_bytes=capacity, dtype=dtype, threads=threads, tiers=tiers)
    if Manifest.read(folder) is None:
        find_files(paths)  # fails before anything is started or made
    try:
        with (
            updating(folder),
            err.status("Starting vLLM") as status,
            open_corpus(folder, settings, create=True, **engine) as (_, corpus),
        ):
            status.stop()
            plan = corpus.plan_update(paths)
            free = "" if plan.free_bytes is None else f", {plan.free_bytes / 1e9:.1f} GB free"
            if plan.report.reprimed:
                err.print(
                    "The index has grown, and takes a primer from its own passages: "
                    f"{plan.report.reprimed} unchanged documents are computed behind it"
                )
            changed = len(plan.pending) - plan.report.reprimed
            err.print(
                f"{changed} new or changed, {len(plan.removed)} gone, {plan.report.unchanged} unchanged: "
                f"{plan.tokens} tokens to read, about {plan.needed_bytes / 1e9:.2f} GB of KV{free}"
            )
            with err.progress() as progress:
                task = progress.add_task("tokens", total=plan.tokens)
                report = corpus.update(
                    plan,
                    lambda tokens: progress.advance(task, tokens),
                    lambda note: progress.update(task, description=note),
                )
    except KeyboardInterrupt:
        err.print("Interrupted: what was done so far is kept. Run the command again to go on.")
        raise typer.Exit(130) from None
    if report.restored:
        err.print(f"{report.restored} of the changed ones had lost KV in the store, which was computed again")
    rate = f", {report.tokens_computed / report.seconds:.0f} tokens/s" if report.tokens_computed else ""
    out.print(
        f"{report.added} added, {report.changed} changed, {report.removed} removed, {report.unchanged} unchanged; "
        f"{report.chunks_computed} passages computed{rate}, {report.chunks_present} present already, "
        f"{report.bytes_stored / 1e6:.0f} MB stored in {corpus.manifest.store_uri(folder)}"
    )
    if report.evicted:
        err.problem(
            "evicted:",
            f"{report.evicted} objects were deleted to keep to the limit, which is too small for these documents and "
            "what else is stored: a larger --capacity keeps them, and the next index run computes them again.",
        )
    for problem in report.refused:
        err.problem("left out:", problem)
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
    tiers: TiersOption = None,
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
        open_corpus(folder, IndexSettings.checked(model=model), **given(dtype=dtype, threads=threads, tiers=tiers)) as (
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
                out.print(delta.text, end="")
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
        out.print(f"{number}. {hit.path}: {' '.join(hit.text.split())[:100]}...", style="dim")
    out.print(f"\n{describe(answer.reuse)}\nTTFT {answer.ttft_s:.3f} s")
    if plain is not None:
        out.print(
            f"\nPlain prefill: {plain.text.strip()}\nTTFT {plain.ttft_s:.3f} s, "
            f"{plain.ttft_s / answer.ttft_s:.1f}x that of the blended answer"
        )


def describe(reuse: ReuseReport) -> str:
    """A reuse report in a sentence."""
    if reuse.mode in ("off", "plain", "continued"):
        share = f"{reuse.local_tokens} in the prefix cache, the rest" if reuse.local_tokens else "all"
        return f"{reuse.prompt_tokens} prompt tokens, {share} by plain prefill ({reuse.reason})"
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
        err.problem("error:", str(error))
        sys.exit(1)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read as text ({error}): name a UTF-8 file.") from error
