"""`lmcache-rag bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lmcache_rag.bench.commands import JsonOption, bench_app, write_rows
from lmcache_rag.errors import PromptError
from lmcache_rag.terminal import err, out, show_rows


@bench_app.command("serve")
def bench_serve_command(
    url: Annotated[
        list[str], typer.Option(help="Of a running server, such as http://127.0.0.1:8000; repeated, of several.")
    ],
    trace: Annotated[
        Optional[Path],
        typer.Option(help="Replay requests: a JSON object a line, with `prompt` or `messages`, `at_s`, `max_tokens`."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Questions; and turns of all chats together.")] = 24,
    concurrency: Annotated[int, typer.Option(min=1, help="Asked at a time.")] = 4,
    pool: Annotated[int, typer.Option(min=1, help="Passages that are stored and asked about.")] = 24,
    passages: Annotated[int, typer.Option(min=1, help="Passages per question.")] = 5,
    passage_tokens: Annotated[int, typer.Option(min=32, help="Tokens per passage.")] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="Turns per chat.")] = 4,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the choice of passages.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """A running server as its clients see it: permuted passages, chats, or a recorded trace, with plain vLLM and with
    lmcache-rag in turn. To store the passages it shows LMCACHE_RAG_INGEST_KEY, where that is set."""
    from lmcache_rag.bench.serving import Size, bench_serving, read_trace
    from lmcache_rag.engine import RemoteEngine

    if passages > pool:
        raise PromptError(f"A question over {passages} passages needs a pool of as many, not {pool}.")
    recorded = [] if trace is None else read_trace(trace)
    size = Size(requests, concurrency, pool, passages, passage_tokens, rounds, answer_tokens)
    with err.status("asking") as status, RemoteEngine(url) as engine:
        rows = bench_serving(engine, size, recorded, seed, status.update)
        out.print(f"{engine.model_name} at {', '.join(url)}")
    show_rows(rows)
    write_rows(rows, json_file)
