"""A page that shows what each token of a prompt came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from lmcache_rag.engine.base import Completion
from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.prompt import Tokenizer
from lmcache_rag.request import ReuseReport

_KINDS = {
    "reused": ("as stored", "#0072b2"),
    "carried": ("as stored, and moved by what recomputing changed in tokens like it", "#56b4e9"),
    "recomputed": ("recomputed, in the light of the whole prompt", "#e69f00"),
    "local": ("in this engine's prefix cache", "#009e73"),
    "missed": ("should have been stored, and was computed", "#d55e00"),
    "unknown": ("in no stored passage, computed", "#cc79a7"),
    "vllm": ("left to vLLM's own prefill", "#999999"),
}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lmcache-rag: one prompt</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
.prompt {{ font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
.prompt span, .legend span {{ border-bottom: 3px solid; padding-bottom: 1px; }}
.legend {{ list-style: none; padding: 0; }}
.legend b {{ font-variant-numeric: tabular-nums; }}
{styles}
</style>
</head>
<body>
<h1>One prompt of {tokens} tokens</h1>
<p>{mode}; the answer began after {ttft:.2f} s.</p>
<ul class="legend">
{legend}
</ul>
<div class="prompt">{prompt}</div>
<h2>Answer</h2>
<div class="prompt">{answer}</div>
</body>
</html>
"""


def write_trace(path: Path, tokenizer: Tokenizer, token_ids: Sequence[int], answer: Completion) -> None:
    """Write the page for a prompt and its answer.

    Raises:
        LmcacheRagError: it cannot be written.
    """
    runs, counts = list(_runs(answer.reuse)), dict.fromkeys(_KINDS, 0)
    spans, start = [], 0
    for kind, length in runs:
        text = tokenizer.decode(token_ids[start : start + length])  # type: ignore[attr-defined]
        spans.append(f'<span class="{kind}" title="{kind}, {length} tokens">{escape(text)}</span>')
        counts[kind] += length
        start += length
    legend = [
        f'<li><span class="{kind}"><b>{counts[kind]}</b> {kind}</span>: {words}</li>'
        for kind, (words, _) in _KINDS.items()
        if counts[kind]
    ]
    page = _PAGE.format(
        styles="\n".join(f".{kind} {{ border-color: {colour} !important; }}" for kind, (_, colour) in _KINDS.items()),
        tokens=len(token_ids),
        mode=escape(f"Mode: {answer.reuse.mode}" + (f", {answer.reuse.reason}" if answer.reuse.reason else "")),
        ttft=answer.ttft_s,
        legend="\n".join(legend),
        prompt="".join(spans),
        answer=escape(answer.text),
    )
    try:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise LmcacheRagError(f"--trace: {path} cannot be written ({error.strerror}).") from error


def _runs(report: ReuseReport) -> Iterator[tuple[str, int]]:
    """What tokens came from; where nothing was blended, what vLLM had, and what it computed."""
    if report.trace:
        yield from report.trace
        return
    if report.local_tokens:
        yield "local", report.local_tokens
    yield "vllm", report.prompt_tokens - report.local_tokens
