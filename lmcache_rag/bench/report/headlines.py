"""The figures that people ask for first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lmcache_rag.bench.report.results import Result, Row


@dataclass(frozen=True)
class Headline:
    """A figure of the first screen."""

    figure: str
    text: str


def headlines(results: Mapping[str, Result]) -> list[Headline]:
    """The figures that people ask for first."""
    return [
        Headline(figure(row), text(row))
        for name, wanted, figure, text in _HEADLINES
        for row in (results[name].rows if name in results else ())
        if wanted(row)
    ]


def held(row: Row) -> str:
    """How many times the engine's KV memory the corpus's KV is."""
    return f"{row['kv_times_memory']:.0f} times the engine's KV memory"


_HEADLINES: tuple[tuple[str, Callable[[Row], bool], Callable[[Row], str], Callable[[Row], str]], ...] = (
    (
        "ttft",
        lambda row: row["mode"] == "blend" and (row["selector"], row["chunks"]) == ("query", "touching"),
        lambda row: f"{row['speedup_vs_full']:.1f}x",
        lambda row: f"lower TTFT for {row['prompt_tokens']:,} tokens at recompute ratio {row['ratio']:g}",
    ),
    (
        "scale",
        lambda row: row["tier"] == "disk",
        lambda row: f"{row['speedup']:.1f}x",
        lambda row: f"lower TTFT from disk at ratio 0.05, over KV that is {held(row)}",
    ),
    (
        "fidelity",
        lambda row: (row["selector"], row["ratio"]) == ("query", 0.15),
        lambda row: f"{row['kl_mean']:.3f}",
        lambda _: "nats from full prefill's next-token distributions at ratio 0.15 (mean KL)",
    ),
    (
        "answers",
        lambda row: row["setting"] == "default",
        lambda row: f"{row['stay_right']} of {row['right_plain']}",
        lambda _: "answers that are right with plain prefill stay right at the default",
    ),
    (
        "codec",
        lambda row: (row["codec"], row["chunk_tokens"]) == ("balanced", 256),
        lambda row: f"{row['ratio_vs_fp16']:.1f}x",
        lambda row: f"smaller than float16 KV, at a KL of {row['kl_mean']:.4f}",
    ),
)
"""Run, which of its rows, the figure, and what it is of."""
