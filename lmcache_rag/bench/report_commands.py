"""`lmcache-rag bench report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lmcache_rag.bench.commands import bench_app
from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.terminal import err, out


@bench_app.command("report")
def bench_report_command(
    into: Annotated[Path, typer.Option("--out", help="Folder of the page, its plots, and the results in `results/`.")],
    run: Annotated[
        str, typer.Option(help="Measure these, separated by commas, again if need be; else all that has no result yet.")
    ] = "",
    collect: Annotated[bool, typer.Option("--collect", help="Measure nothing; write the page anew.")] = False,
    take: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME=FILE", help="Take the rows that this machine wrote with --json as a run's result."),
    ] = None,
    questions: Annotated[
        Optional[Path], typer.Option(help="JSON list of objects with `question`, `answers` and `ctxs`.")
    ] = None,
    passages: Annotated[
        Optional[Path], typer.Option(help="Text: a JSON object with `text`, and perhaps `title`, a line.")
    ] = None,
    corpus: Annotated[Optional[Path], typer.Option(help="Documents, for `bench answers`.")] = None,
    asked: Annotated[Optional[Path], typer.Option(help="Questions about them, for `bench answers`.")] = None,
) -> None:
    """All benchmarks on one page, index.html, and in README.md. Hours the first time: each result is kept as soon as it
    is there, and what has one is not measured again."""
    try:
        from lmcache_rag.bench.report.page import write_page
    except ImportError as error:
        raise LmcacheRagError(
            f"The page needs the extra `report`: pip install 'lmcache-rag[report]' ({error})."
        ) from None
    from lmcache_rag.bench.report.results import Result, read_results, writing
    from lmcache_rag.bench.report.runs import ASKED, CORPUS, PASSAGES, QUESTIONS, RUNS, chosen_runs, measure

    folder, names = into / "results", [known.name for known in RUNS]
    with writing(folder):
        pass  # before hours of measuring
    for name, _, file in (each.partition("=") for each in take or ()):
        Result.of(name, chosen_runs([name])[0].command, Path(file)).write(folder)
    kept = read_results(folder, names)
    wanted = chosen_runs([name.strip() for name in run.split(",")]) if run else [r for r in RUNS if r.name not in kept]
    given = {QUESTIONS: questions, PASSAGES: passages, CORPUS: corpus, ASKED: asked}
    problems = []
    if not collect:
        with err.status("") as status:
            files = {name: path for name, path in given.items() if path is not None}
            problems = measure(wanted, folder, files, status.update)
    results = read_results(folder, names)
    for problem in problems:
        err.problem("not measured:", problem)
    if not results:
        raise LmcacheRagError(f"{folder} has no result, so there is no page to write.")
    with writing(into):
        page, text = write_page(results, into)
    out.print(f"{len(results)} of {len(names)} runs are in {page} and {text}")
    if problems:
        raise typer.Exit(1)
