"""`lmcache-rag index`: documents to an index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lmcache_rag.cli.interrupts import INTERRUPTED
from lmcache_rag.cli.start import started
from lmcache_rag.errors import PromptError
from lmcache_rag.terminal import (
    DEFAULT_INDEX,
    CapacityOption,
    CodecOption,
    DtypeOption,
    IndexOption,
    ModelOption,
    ThreadsOption,
    TiersOption,
    err,
    given,
    out,
)

if TYPE_CHECKING:
    from lmcache_rag.corpus import Corpus, IndexSettings, UpdateReport
    from lmcache_rag.engine import Engine


def index(
    paths: Annotated[
        list[Path], typer.Argument(help="Documents (text, Markdown, PDF, HTML, Word), or folders of them.")
    ],
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
    server: Annotated[
        Optional[list[str]],
        typer.Option(help="Have running servers compute the KV, no engine is started; repeated, they share the work."),
    ] = None,
    codec: CodecOption = None,
    capacity: CapacityOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Index documents: find passages, compute the KV of each once, and store it. Run again, it does what changed."""
    from lmcache_rag.corpus import IndexSettings, Manifest, find_files, updating

    folder = folder.expanduser()
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
    if server and (model or engine):
        raise PromptError(
            "--server: model, codec, capacity, tiers, dtype and threads are the server's: leave them out."
        )
    if Manifest.read(folder) is None:
        find_files(paths)  # fails before anything is started or made
    try:
        with updating(folder), _opened(server, folder, settings, engine) as (_, corpus):
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
        raise typer.Exit(INTERRUPTED) from None
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
    _tell_left_out(report)
    if report.faults:
        raise typer.Exit(1)


@contextmanager
def _opened(
    servers: list[str] | None, folder: Path, settings: IndexSettings, engine: Mapping[str, Any]
) -> Iterator[tuple[Engine, Corpus]]:
    """The index to be changed, by an engine that is started for it, or by servers where some are named."""
    if not servers:
        with started(folder, settings, create=True, **engine) as opened:
            yield opened
        return
    from lmcache_rag.corpus import open_through

    with open_through(folder, settings, servers) as opened_through:
        yield opened_through


def _tell_left_out(report: UpdateReport) -> None:
    for problem in (*report.refused, *report.faults):
        err.problem("left out:", problem)
    if report.refused_before:
        err.print(f"{report.refused_before} files are left out as they were before, since they have not changed")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read as text ({error}): name a UTF-8 file.") from error
