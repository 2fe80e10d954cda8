"""Which benchmarks make up the report, and running them one after the other, each in a process of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_rag.bench.report.results import Result
from lmcache_rag.errors import LmcacheRagError

QUESTIONS, PASSAGES, CORPUS, ASKED = "QUESTIONS", "PASSAGES", "CORPUS", "ASKED"
"""What stands in commands for the files that a user gives."""

NEEDED = {
    QUESTIONS: "--questions: JSON list of objects with `question`, `answers` and `ctxs`",
    PASSAGES: "--passages: a JSON object with `text`, and perhaps `title`, a line",
    CORPUS: "--corpus: documents",
    ASKED: "--asked: JSON list of objects with `question` and `expected` about the corpus",
}


@dataclass(frozen=True)
class Run:
    """One benchmark of the report.

    Attributes:
        name: of its result.
        arguments: of `lmcache-rag bench`, without `--json`.
        minutes: that it takes on two cores without AVX-512, about.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: int

    @property
    def command(self) -> str:
        """As a user would type it, with capitals for files."""
        return shlex.join(("lmcache-rag", "bench", *self.arguments))


def _run(name: str, minutes: int, arguments: str) -> Run:
    return Run(name, tuple(arguments.split()), minutes)


RUNS = (
    _run("ttft_650", 2, "ttft --chunks 5 --chunk-tokens 120 --ratios 0.05,0.15"),
    _run("ttft_1550", 4, "ttft --chunks 5 --chunk-tokens 300 --ratios 0.05,0.15"),
    _run(
        "ttft",
        10,
        "ttft --chunks 5 --chunk-tokens 580 --ratios 0.05,0.1,0.15 --selectors default,cacheblend,head",
    ),
    _run("ttft_6000", 15, "ttft --chunks 10 --chunk-tokens 590 --ratios 0.05,0.15 --repeat 3"),
    _run(
        "fidelity",
        45,
        f"fidelity --data {QUESTIONS} --selectors default,cacheblend,head --ratios 0.05,0.1,0.15 --limit 40",
    ),
    _run(
        "answers",
        35,
        f"answers --corpus {CORPUS} --questions {ASKED} --limit 200 --passages 4 --chunk-tokens 250 --no-wrong",
    ),
    _run("throughput", 20, "throughput --concurrency 1,4,8"),
    _run("chat", 40, f"chat --data {QUESTIONS} --conversations 3 --idle 8,0 --codec raw"),
    _run("frameworks", 30, "frameworks"),
    _run("codec", 25, f"codec --data {QUESTIONS} --calibration {PASSAGES} --limit 40"),
    _run("scale", 90, f"scale --data {PASSAGES}"),
    _run("streaming", 8, "streaming"),
    _run("peers", 10, "peers"),
    _run("store", 6, "store --chunks 1000000"),
)


def chosen_runs(names: Sequence[str]) -> list[Run]:
    """The named runs, all where none is named.

    Raises:
        LmcacheRagError: there is none of that name.
    """
    known = {run.name: run for run in RUNS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LmcacheRagError(f"There is no run {unknown[0]!r}; there are {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names)] or list(RUNS)


def measure(runs: Sequence[Run], into: Path, files: Mapping[str, Path], progress: Callable[[str], Any]) -> list[str]:
    """Have runs measured, one after the other, and each result written as soon as it is there.

    Args:
        into: folder of results.
        files: what stands for the capitals in the runs' commands.

    Returns:
        What could not be measured, and why.
    """
    problems = []
    for run in runs:
        missing = [NEEDED[name] for name in NEEDED if name in run.arguments and name not in files]
        if missing:
            problems.append(f"{run.name} was not measured: give {missing[0]}")
            continue
        progress(f"{run.name}, some {run.minutes} minutes on two cores: {run.command}")
        try:
            _measured(run, files).write(into)
        except LmcacheRagError as error:
            problems.append(f"{run.name} failed: {error}")
    return problems


def _measured(run: Run, files: Mapping[str, Path]) -> Result:
    given = [str(files[argument]) if argument in NEEDED else argument for argument in run.arguments]
    with tempfile.TemporaryDirectory(prefix="lmcache-rag-bench-") as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "lmcache_rag", "bench", *given, "--json", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own command
        if done.returncode:
            raise LmcacheRagError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return Result.of(run.name, run.command, rows)
