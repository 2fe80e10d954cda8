"""`lmcache-rag store why`: what would be reused of a prompt, which takes an index or a tokenizer besides the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lmcache_rag.blobs.uri import open_existing
from lmcache_rag.library.commands import JsonOption, show, store_app
from lmcache_rag.terminal import out


@store_app.command("why")
def why_command(
    prompt: Annotated[Path, typer.Argument(help="File with the text of a prompt.")],
    index: Annotated[Optional[Path], typer.Option(help="Folder of the index that it is asked over.")] = None,
    location: Annotated[Optional[str], typer.Option("--store", help="Or a store, with --model.")] = None,
    model: Annotated[Optional[str], typer.Option(help="Model of --store, a Hugging Face id or folder.")] = None,
    namespace: Annotated[Optional[str], typer.Option(help="Whose KV.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What would be reused of a prompt, run by run, and why not. Whether an engine would rather compute it, since that
    is faster, only the engine knows."""
    from lmcache_rag.corpus.why import explained

    store = None if location is None else open_existing(location)
    rows, reason = explained(prompt, index, store, model, namespace)
    show(rows, as_json=as_json)
    if not as_json:
        out.print(f"Nothing would be reused: {reason}." if reason else "What is fastest is known to an engine only.")
