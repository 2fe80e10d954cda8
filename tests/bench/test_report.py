"""The report: what was measured is kept, and the page says it, in a form that browsers read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from lmcache_rag.bench.report import runs
from lmcache_rag.bench.report.page import write_page
from lmcache_rag.bench.report.results import Machine, Result, read_results
from lmcache_rag.bench.report.runs import RUNS, chosen_runs, measure
from lmcache_rag.bench.report.sections import sections
from lmcache_rag.cli.app import app
from lmcache_rag.errors import LmcacheRagError

SHIPPED = Path(__file__).parents[2] / "docs" / "report" / "results"
NAMES = [run.name for run in RUNS]


def rows_of(tokens: int, full_s: float) -> list[dict[str, Any]]:
    """As `bench ttft` writes them."""
    made = [("full", "", 1.0, full_s), ("prefix_cache", "", 0.0, 0.1), ("reuse", "none", 0.0, 0.2)]
    made += [("blend", "query", ratio, 0.2 + ratio * full_s) for ratio in (0.05, 0.15)]
    rows = [
        {
            "mode": mode, "selector": selector, "ratio": ratio, "chunks": "" if mode in ("full", "prefix_cache") else
            "touching", "prompt_tokens": tokens, "ttft_median_s": seconds,
            "speedup_vs_full": round(full_s / seconds, 2), "times_bound": 1.5,
            "phases_ms": {"load": 100, "recompute": 300, "vllm": 50},
        }
        for mode, selector, ratio, seconds in made
    ]  # fmt: skip
    ingest = {"mode": "ingest", "tokens": 580, "seconds": 2.0, "vs_plain_prefill": 0.9, "primed_seconds": 4.0}
    return [*rows, {**ingest, "primed_vs_plain_prefill": 1.9}]


def result(folder: Path, name: str, rows: list[dict[str, Any]]) -> Result:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return Result.of(name, f"lmcache-rag bench {name}", file)


def test_this_machine() -> None:
    machine = Machine.here()
    assert machine.cpu and machine.cores >= 1 and machine.memory_gib >= 1
    assert machine.cpu in str(machine)


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    made = result(tmp_path, "ttft", rows_of(2947, 14.0))
    path = made.write(tmp_path / "results")
    assert read_results(tmp_path / "results", NAMES) == {"ttft": made}
    path.write_text(path.read_text().replace('"cpu"', '"gpu"'))
    with pytest.raises(LmcacheRagError, match=r"ttft\.json is no result: machine"):
        read_results(tmp_path / "results", NAMES)
    with pytest.raises(LmcacheRagError, match="no rows"):
        result(tmp_path, "ttft", [])


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    made = {
        "ttft": result(tmp_path, "ttft", rows_of(2947, 14.0)),
        "ttft_650": result(tmp_path, "ttft_650", rows_of(647, 2.0)),
        "store": result(tmp_path, "store", [{"chunks": 5, "note": "<b>|"}]),
    }
    page, text = write_page(made, tmp_path / "report")
    html, markdown = page.read_text(), text.read_text()
    assert "<b>6.1x</b> lower TTFT for 2,947 tokens at recompute ratio 0.15" in html.replace("\n", " ")
    assert "&lt;b&gt;|" in html and r"<b>\|" in markdown
    assert str(Machine.here()) in markdown and "lmcache-rag bench ttft_650" in markdown
    drawn = [section.name for section in sections(made) if section.plot]
    assert drawn == ["lengths", "phases"]
    for name in drawn:
        assert f"(plots/{name}.png)" in markdown
        assert (tmp_path / "report" / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "http" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", ""), "the page needs nothing else"


def test_plots_have_the_colour_of_the_text(tmp_path: Path) -> None:
    for section in sections({"ttft": result(tmp_path, "ttft", rows_of(2947, 14.0))}):
        assert section.plot is not None
        element = ET.fromstring(section.plot.svg)
        assert "currentColor" in section.plot.svg and "width" not in element.attrib and "viewBox" in element.attrib


def test_runs_are_measured_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: object) -> Any:
        asked.append(command[3:-2])
        if "streaming" in command:
            return subprocess.CompletedProcess(command, 1, "", "Starting\nerror: no room\n")
        Path(command[-1]).write_text(json.dumps([{"tier": "disk"}]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(runs.subprocess, "run", run)
    data = tmp_path / "text.jsonl"
    wanted = chosen_runs(["streaming", "chat", "scale"])
    problems = measure(wanted, tmp_path, {runs.PASSAGES: data}, lambda _: None)
    assert asked == [["bench", "streaming"], ["bench", "scale", "--data", str(data)]]
    assert problems[0] == "streaming failed: error: no room"
    assert problems[1].startswith("chat was not measured: give --questions")
    assert read_results(tmp_path, NAMES)["scale"].command == "lmcache-rag bench scale --data PASSAGES"
    with pytest.raises(LmcacheRagError, match="no run 'nap'"):
        chosen_runs(["nap"])


def test_the_commands_are_ours() -> None:
    runner = CliRunner()
    for run in RUNS:
        shown = runner.invoke(app, ["bench", run.arguments[0], "--help"], env={"COLUMNS": "200"}).output
        assert all(f"{argument} " in shown for argument in run.arguments if argument.startswith("--")), run.name


def test_rows_are_taken_and_collected(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(rows_of(2947, 14.0)))
    command = ["bench", "report", "--out", str(tmp_path / "report"), "--collect"]
    done = CliRunner().invoke(app, [*command, "--take", f"ttft={rows}"])
    assert done.exit_code == 0 and f"1 of {len(RUNS)} runs" in done.output
    assert (tmp_path / "report" / "index.html").exists()
    with pytest.raises(LmcacheRagError, match="no run 'tft'"):
        CliRunner().invoke(app, [*command, "--take", f"tft={rows}"], catch_exceptions=False)
    with pytest.raises(LmcacheRagError, match="no result, so there is no page"):
        CliRunner().invoke(
            app, ["bench", "report", "--out", str(tmp_path / "none"), "--collect"], catch_exceptions=False
        )


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LmcacheRagError, match="cannot be written to"):
        CliRunner().invoke(app, ["bench", "report", "--out", str(tmp_path / "file")], catch_exceptions=False)


def test_the_shipped_page_is_that_of_the_shipped_results(tmp_path: Path) -> None:
    page, text = write_page(read_results(SHIPPED, NAMES), tmp_path)
    assert text.read_text() == (SHIPPED.parent / "README.md").read_text()
    assert page.stat().st_size > 10_000
