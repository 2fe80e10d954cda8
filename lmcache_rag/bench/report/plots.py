"""Plots of what the benchmarks measured, as SVG for the page and PNG beside it.

Text and axes of the SVG have the colour of the page's text, so that it can be read in light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmcache_rag.bench.report.results import Row

_INK = "#010203"
"""Stands for the colour of the page's text."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#80808050",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}

BLEND, FULL, CACHED, REUSE, OTHER = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
"""Colours that people who see few of them can tell apart (Okabe and Ito, 2008)."""

_PHASES = {"plan": OTHER, "queue": "#999999", "load": CACHED, "select": REUSE, "recompute": BLEND, "write": "#f0e442"}
_LEFT = "vllm"


@dataclass(frozen=True)
class Plot:
    """A drawn plot.

    Attributes:
        svg: an element, for a page of HTML.
        png: the same on white.
    """

    svg: str
    png: bytes

    def write(self, path: Path) -> None:
        """Write the PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.png)


def drawn(name: str, draw: Callable[[Figure], Any], width: float = 7.0, height: float = 3.6) -> Plot:
    """What a function draws into a figure of so many inches."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    element = svg.getvalue()[svg.getvalue().index("<svg") :].replace(_INK, "currentColor")
    return Plot(re.sub(r'(<svg[^>]*?) width="[^"]*"( height="[^"]*")?', r"\1", element, count=1), png.getvalue())


def frontier(figure: Figure, fidelity: Sequence[Row], ttft: Sequence[Row]) -> None:
    """Quality against TTFT: a line per selector, a point per ratio that both benchmarks have."""
    axes = figure.subplots()
    speedups = {
        (row["selector"], row["ratio"]): row["speedup_vs_full"]
        for row in ttft
        if row["mode"] in ("blend", "reuse") and row["chunks"] != "joined"
    }
    lines = (
        ("query", True, BLEND, "query (default)"),
        ("cacheblend", True, OTHER, "cacheblend, on our primed chunks"),
        ("cacheblend", False, FULL, "cacheblend, chunks computed alone"),
        ("head", True, CACHED, "head"),
    )
    for selector, primed, colour, label in lines:
        rows = [row for row in fidelity if row["preamble"] == primed and row["selector"] in (selector, "none")]
        points = sorted((speedups[at], row["kl_mean"], row["ratio"]) for row in rows if (at := _at(row)) in speedups)
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=colour, label=label)
        for x, y, ratio in points if selector == "query" else ():
            axes.annotate(f"r={ratio:g}", (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(
        xlabel="times faster than full prefill (TTFT)", ylabel="KL to full prefill, nats", xscale="log", ylim=(0, None)
    )
    axes.set_xticks(ticks := [2, 3, 4, 6, 10, 20], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(title="selector")


def _at(row: Row) -> tuple[str, float]:
    return row["selector"], row["ratio"]


def by_length(figure: Figure, runs: Iterable[Sequence[Row]]) -> None:
    """TTFT against the prompt's length."""
    axes = figure.subplots()
    rows = [row for run in runs for row in run if row["mode"] != "ingest" and row["chunks"] != "joined"]
    lines = {
        "full prefill": (FULL, lambda row: row["mode"] == "full"),
        "blend, r=0.15": (BLEND, lambda row: row["mode"] == "blend" and _at(row) == ("query", 0.15)),
        "blend, r=0.05": (OTHER, lambda row: row["mode"] == "blend" and _at(row) == ("query", 0.05)),
        "reuse, r=0": (REUSE, lambda row: row["mode"] == "reuse"),
        "prefix cache": (CACHED, lambda row: row["mode"] == "prefix_cache"),
    }
    for label, (colour, wanted) in lines.items():
        points = sorted((row["prompt_tokens"], row["ttft_median_s"]) for row in rows if wanted(row))
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    axes.set(xlabel="prompt, tokens", ylabel="TTFT, s", xscale="log", yscale="log")
    lengths = sorted({round(row["prompt_tokens"], -1) for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_yticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="upper left")


def phases(figure: Figure, ttft: Sequence[Row]) -> None:
    """Where the time goes, a bar per way of answering."""
    axes = figure.subplots()
    rows = [row for row in ttft if row["mode"] in ("blend", "reuse") and row["chunks"] != "joined"]
    rows = [row for row in rows if row["selector"] in ("query", "none")]
    labels = [f"r={row['ratio']:g}" for row in rows]
    left = [0.0] * len(rows)
    for phase, colour in (*_PHASES.items(), (_LEFT, FULL)):
        seconds = [row["phases_ms"].get(phase, 0) / 1000 for row in rows]
        axes.barh(labels, seconds, left=left, color=colour, label=phase)
        left = [start + length for start, length in zip(left, seconds, strict=True)]
    axes.set(xlabel="TTFT, s")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def chat(figure: Figure, rows: Sequence[Row]) -> None:
    """TTFT of each turn: a field per workload and pause."""
    fields = list(dict.fromkeys((row["workload"], row["idle_s"]) for row in rows))
    across = 2
    grid = figure.subplots(-(-len(fields) // across), across, squeeze=False, sharex=True).flat
    for axes, (workload, idle) in zip(grid, fields, strict=False):
        for mode, colour, label in (("prefix_cache", FULL, "vLLM's prefix cache"), ("blend", BLEND, "lmcache-rag")):
            turns = [row for row in rows if (row["workload"], row["idle_s"], row["mode"]) == (workload, idle, mode)]
            axes.plot(
                [row["turn"] for row in turns], [row["ttft_median_s"] for row in turns], "o-", color=colour, label=label
            )
        pause = f"{idle:g} s between turns" if idle else "no pause"
        axes.set_title(f"{workload.replace('_', ' ')}, {pause}", fontsize=9)
        axes.set(ylabel="TTFT, s", ylim=(0, None))
    grid[0].legend(fontsize=8)


def load(figure: Figure, rows: Sequence[Row]) -> None:
    """Requests per second, and gaps in streams, against how many are asked at a time."""
    left, right = figure.subplots(1, 2)
    modes = (("full", FULL, "full prefill"), ("prefix_cache", CACHED, "prefix cache"), ("blend", BLEND, "blend"))
    levels = sorted({row["concurrency"] for row in rows})
    for number, (mode, colour, label) in enumerate(modes):
        of_mode = {row["concurrency"]: row for row in rows if row["mode"] == mode}
        places = [place + 0.27 * (number - 1) for place in range(len(levels))]
        left.bar(places, [of_mode[level]["requests_per_s"] for level in levels], 0.25, color=colour, label=label)
        right.bar(places, [of_mode[level]["itl_p99_ms"] / 1000 for level in levels], 0.25, color=colour)
    for axes, title in ((left, "requests/s"), (right, "p99 between two tokens, s")):
        axes.set_xticks(range(len(levels)), [str(level) for level in levels])
        axes.set(xlabel="requests at a time", title=title)
    left.legend(fontsize=8)


def codecs(figure: Figure, rows: Sequence[Row], tokens: int) -> None:
    """Size against quality, a point per codec."""
    axes = figure.subplots()
    for row in (row for row in rows if row["chunk_tokens"] == tokens):
        axes.plot(row["ratio_vs_fp16"], max(row["kl_mean"], 1e-5), "o", color=BLEND)
        at = (row["ratio_vs_fp16"], max(row["kl_mean"], 1e-5))
        axes.annotate(row["codec"], at, textcoords="offset points", xytext=(6, 4))
    axes.set(xlabel="times smaller than float16", ylabel="KL to KV as computed, nats", xscale="log", yscale="log")
    axes.set_xticks(ticks := [0.5, 1, 2, 4, 8, 16], [str(tick) for tick in ticks])
    axes.minorticks_off()


def bars(figure: Figure, values: Mapping[str, float], label: str) -> None:
    """A bar per name, the first on top."""
    axes = figure.subplots()
    names = list(values)[::-1]
    found = axes.barh(names, [values[name] for name in names], color=BLEND)
    axes.bar_label(found, fmt="%.1f", padding=3)
    axes.set(xlabel=label)


def right_answers(figure: Figure, rows: Sequence[Row]) -> None:
    """How many right answers stay right, with 95% intervals."""
    axes: Axes = figure.subplots()
    for place, row in enumerate(rows[::-1]):
        low, high = row["stay_right_ci95"]
        axes.plot([low, high], [place, place], color=BLEND)
        axes.plot(row["stay_right_share"], place, "o", color=BLEND)
    axes.set_yticks(range(len(rows)), [row["setting"] for row in rows[::-1]])
    axes.set(xlabel="of plain prefill's right answers that stay right", xlim=(0, 1.02))
