"""What the page says, from whatever results there are: sections of words, a table, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lmcache_rag.bench.report import plots
from lmcache_rag.bench.report.headlines import held
from lmcache_rag.bench.report.plots import Plot, drawn
from lmcache_rag.bench.report.results import Result, Row

Columns = Mapping[str, str | Callable[[Row], str]]
"""Heading -> field of a row, or what is made of it."""


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        results: that it is made from.
    """

    name: str
    title: str
    text: str
    results: tuple[Result, ...]
    table: Table
    plot: Plot | None = None


def sections(results: Mapping[str, Result]) -> list[Section]:
    """What can be said with these results."""
    return [section for make in _SECTIONS for section in make(results)]


def _ttft(results: Mapping[str, Result]) -> Iterator[Section]:
    if "ttft" in results and "fidelity" in results:
        fidelity, ttft = results["fidelity"].rows, results["ttft"].rows
        yield Section(
            "frontier",
            "Quality against time",
            "How far next-token distributions are from full prefill's (mean KL divergence, lower is better), against "
            "how much sooner the answer begins (further right is better). Each point is a recompute ratio; the "
            "rightmost is reuse without any repair. Quality is that of questions over about 1,000 tokens, time that of "
            f"one prompt of {ttft[0]['prompt_tokens']:,}.",
            (results["fidelity"], results["ttft"]),
            _table(
                fidelity,
                {
                    "selector": lambda row: row["selector"] + ("" if row["preamble"] else ", chunks computed alone"),
                    "ratio": "ratio",
                    "FLOPs": lambda row: f"{row['flops_share']:.1%}",
                    "KL mean (95% interval)": lambda row: f"{row['kl_mean']:.3f} ({_interval(row['kl_ci95'])})",
                    "median": "kl_median",
                    "p90": "kl_p90",
                    "top-1": "top1",
                    "ROUGE-L to full": "rougeL_vs_full",
                    "F1": "f1",
                },
            ),
            drawn("frontier", lambda figure: plots.frontier(figure, fidelity, ttft)),
        )
    runs = [result for name, result in results.items() if name.startswith("ttft")]
    if runs:
        yield Section(
            "lengths",
            "Time to first token",
            "One prompt whose passages are stored, against full prefill and against a prompt that vLLM's prefix cache "
            "holds as a whole. `touching` chunks follow each other, `joined` ones have a blank line between them. The "
            "bound is the ratio times full prefill, and what a prompt in the prefix cache takes.",
            tuple(runs),
            _table(
                [row for result in runs for row in result.rows if row["mode"] != "ingest"],
                {
                    "tokens": "prompt_tokens",
                    "mode": lambda row: row["mode"].replace("_", " "),
                    "selector": "selector",
                    "ratio": lambda row: f"{row['ratio']:g}" if row["mode"] in ("blend", "reuse") else "",
                    "chunks": "chunks",
                    "TTFT, s": lambda row: f"{row['ttft_median_s']:.2f}",
                    "against full": lambda row: f"{row['speedup_vs_full']:.1f}x",
                    "times the bound": lambda row: (
                        f"{row['times_bound']:.2f}" if row["mode"] in ("blend", "reuse") else ""
                    ),
                },
            ),
            drawn("lengths", lambda figure: plots.by_length(figure, [result.rows for result in runs])),
        )
    if "ttft" in results:
        rows = results["ttft"].rows
        yield Section(
            "phases",
            "Where the time goes",
            "Phases of the TTFT of the same prompt: reading and decoding KV, choosing tokens, recomputing them, "
            "writing into vLLM's paged cache; `vllm` is its own work up to the first token.",
            (results["ttft"],),
            _table(
                [row for row in rows if row["mode"] == "ingest"],
                {
                    "ingest, tokens": "tokens",
                    "seconds": "seconds",
                    "times plain prefill": "vs_plain_prefill",
                    "with the primed variant, s": "primed_seconds",
                    "times plain prefill ": "primed_vs_plain_prefill",
                },
            ),
            drawn("phases", lambda figure: plots.phases(figure, rows), height=3.0),
        )


def _answers(results: Mapping[str, Result]) -> Iterator[Section]:
    if "answers" in results:
        rows = results["answers"].rows
        yield Section(
            "answers",
            "Answers that stay right",
            f"Of {rows[0]['questions']} questions about the handbook that ships with the project, the model answers "
            f"{rows[0]['right_plain']} right with plain prefill; how many of those it still answers right with blended "
            "KV. A right answer contains a given phrase. Intervals are of 95%.",
            (results["answers"],),
            _table(
                rows,
                {
                    "setting": "setting",
                    "stay right": lambda row: f"{row['stay_right']} of {row['right_plain']}",
                    "95% interval": lambda row: f"{row['stay_right_ci95'][0]:.0%} to {row['stay_right_ci95'][1]:.0%}",
                    "word for word the same": lambda row: f"{row['same_text_share']:.0%}",
                    "recomputed": lambda row: f"{row['recompute_share_mean']:.1%}",
                    "TTFT": lambda row: f"{row['speedup']:.1f}x lower",
                },
            ),
            drawn("answers", lambda figure: plots.right_answers(figure, rows), height=2.4),
        )


def _chat(results: Mapping[str, Result]) -> Iterator[Section]:
    if "chat" in results:
        rows = results["chat"].rows
        yield Section(
            "chat",
            "Conversations and repeated passages",
            "Each turn asked of vLLM with its prefix cache and of lmcache-rag, under salts of their own. `same "
            "passages` asks new questions over the same passages, `growing chat` adds to the history, `new passages` "
            "and `more passages` bring other ones before and behind it, `second engine` asks each turn of the other of "
            "two engines on one store. While nobody asks, exact KV is made of what was blended.",
            (results["chat"],),
            _table(
                rows,
                {
                    "workload": lambda row: row["workload"].replace("_", " "),
                    "pause, s": lambda row: f"{row['idle_s']:g}",
                    "turn": "turn",
                    "mode": lambda row: row["mode"].replace("_", " "),
                    "TTFT, s": lambda row: f"{row['ttft_median_s']:.2f}",
                    "answered from": lambda row: ", ".join(row["answered_from"]),
                    "KL": "kl_to_full",
                    "computed tokens": "computed_tokens",
                },
            ),
            drawn("chat", lambda figure: plots.chat(figure, rows), height=8.0),
        )


def _load(results: Mapping[str, Result]) -> Iterator[Section]:
    if "throughput" in results:
        rows = results["throughput"].rows
        yield Section(
            "load",
            "Under load",
            "Different questions over passages of a pool, several at a time. The gap is the 99th percentile of the "
            "time between two tokens of a stream, while other prompts are blended or prefilled.",
            (results["throughput"],),
            _table(
                rows,
                {
                    "at a time": "concurrency",
                    "mode": lambda row: row["mode"].replace("_", " "),
                    "requests/s": "requests_per_s",
                    "TTFT p50, s": "ttft_p50_s",
                    "p95, s": "ttft_p95_s",
                    "per further token, s": "tpot_p50_s",
                    "p99 between tokens, s": lambda row: f"{row['itl_p99_ms'] / 1000:.2f}",
                },
            ),
            drawn("load", lambda figure: plots.load(figure, rows)),
        )


def _applications(results: Mapping[str, Result]) -> Iterator[Section]:
    if "frameworks" in results:
        rows = results["frameworks"].rows
        named = {f"{row['framework']}: {row['app']}": row["speedup"] for row in rows}
        yield Section(
            "frameworks",
            "Applications of LlamaIndex and LangChain",
            "As their tutorials write them, over five passages of 300 tokens. `known` is the share of a prompt that "
            "was in the store or the prefix cache, `foreign` what of it was computed behind other text. Applications "
            "that ask several times count all their prompts.",
            (results["frameworks"],),
            _table(
                rows,
                {
                    "application": lambda row: f"{row['framework']}: {row['app']}",
                    "calls": lambda row: f"{row['calls']:g}",
                    "tokens a prompt": "prompt_tokens",
                    "plain, s": lambda row: f"{row['ttft_plain_s']:.2f}",
                    "blended, s": lambda row: f"{row['ttft_s']:.2f}",
                    "faster": lambda row: f"{row['speedup']:.1f}x",
                    "known": lambda row: f"{row['reused_share']:.0%}",
                    "foreign": lambda row: f"{row['foreign_share']:.0%}",
                },
            ),
            drawn("frameworks", lambda figure: plots.bars(figure, named, "times lower TTFT"), height=4.6),
        )


def _kept(results: Mapping[str, Result]) -> Iterator[Section]:
    if "scale" in results:
        rows = results["scale"].rows
        yield Section(
            "scale",
            "Many times the KV memory",
            "Questions over five chunks drawn at random from a corpus whose KV, uncoded, is "
            f"{held(rows[0])}, by where it lies. S3 (moto's server) and Redis run on the same cores.",
            (results["scale"],),
            _table(
                rows,
                {
                    "KV from": "tier",
                    "TTFT, s": lambda row: f"{row['ttft_blend_s']:.2f}",
                    "full prefill, s": lambda row: f"{row['ttft_full_s']:.2f}",
                    "faster": lambda row: f"{row['speedup']:.1f}x",
                    "of it loading, ms": "load_ms",
                    "found": lambda row: f"{row['hit_rate']:.0%}",
                    "questions": "questions",
                },
            ),
            drawn(
                "scale",
                lambda figure: plots.bars(figure, {row["tier"]: row["speedup"] for row in rows}, "times lower TTFT"),
                height=2.4,
            ),
        )
    if "codec" in results:
        rows = results["codec"].rows
        yield Section(
            "codec",
            "Bytes",
            "Each codec on real KV: whole objects, speeds on one thread in MB of float16 KV, and how far its errors "
            "move next-token distributions, with nothing blended. The plot has pieces of 256 tokens.",
            (results["codec"],),
            _table(
                rows,
                {
                    "codec": "codec",
                    "tokens": "chunk_tokens",
                    "bytes": lambda row: f"{row['bytes']:,}",
                    "against float16": lambda row: f"{row['ratio_vs_fp16']}x",
                    "encode, MB/s": "encode_mb_s",
                    "decode, MB/s": "decode_mb_s",
                    "error of K / V": lambda row: f"{row['rel_l2_k']:.3f} / {row['rel_l2_v']:.3f}",
                    "KL": lambda row: f"{row['kl_mean']:.4f}",
                },
            ),
            drawn("codec", lambda figure: plots.codecs(figure, rows, 256)),
        )
    for name, title, text in (
        ("streaming", "A goal for the TTFT", "A store that is slow, or becomes slow in the middle of a request."),
        ("store", "What is stored", "Finding chunks in prompts of 8,000 tokens, while another process writes."),
    ):
        if name in results:
            fields = list(dict.fromkeys(field for row in results[name].rows for field in row))
            columns = {field.replace("_", " "): field for field in fields}
            yield Section(name, title, text, (results[name],), _table(results[name].rows, columns))


def _peers(results: Mapping[str, Result]) -> Iterator[Section]:
    if "peers" in results:
        yield Section(
            "peers",
            "Beside others",
            "The same model, prompts and threads: a `first` question over five passages that are stored, where there "
            "is a store; another one over the `same`; and one over them in another order, `permuted`. Faster than "
            "vLLM's full prefill; KL of the first token to the peer's own full prefill; `reused` as the peer says. "
            "kvboost runs on Hugging Face transformers, with its settings as they are.",
            (results["peers"],),
            _table(
                results["peers"].rows,
                {
                    "peer": "peer",
                    "question": "workload",
                    "TTFT, s": lambda row: f"{row['ttft_median_s']:.2f}",
                    "faster": lambda row: f"{row['speedup']:.1f}x",
                    "KL": lambda row: f"{row['kl_first_token']:.3f}",
                    "reused": lambda row: f"{row['reused_share']:.0%}",
                    "bytes of KV a token": lambda row: f"{row['kv_bytes_per_token']:,}",
                },
            ),
        )


_SECTIONS = (_ttft, _answers, _applications, _chat, _load, _kept, _peers)


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _table(rows: Iterable[Row], columns: Columns) -> Table:
    lines = tuple(
        tuple(str(row.get(value, "")) if isinstance(value, str) else value(row) for value in columns.values())
        for row in rows
    )
    return Table(tuple(columns), lines)
