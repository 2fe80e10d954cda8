"""The command line of what looks after a store: `lmcache-rag store`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmcache_rag.errors import StoreError
from lmcache_rag.terminal import err, out

store_app = typer.Typer(no_args_is_help=True, help="Look after a KV store.")


@store_app.callback()
def _store() -> None:
    """Keeps `rebuild` a command of its own."""


@store_app.command("rebuild")
def rebuild_command(
    where: Annotated[str, typer.Argument(metavar="STORE", help="Folder or URI of the KV store, such as INDEX/kv.")],
) -> None:
    """Make the records of what is stored anew from the stored objects, where they are lost or damaged."""
    from lmcache_rag.blobs.uri import is_folder, open_store
    from lmcache_rag.library.rebuild import rebuild
    from lmcache_rag.library.scopes import scopes_of

    if is_folder(where) and not Path(where).expanduser().is_dir():
        raise StoreError(f"There is no store in {where}: name the folder or URI that --store named, or INDEX/kv.")
    store = open_store(where)
    scopes = scopes_of(store)
    if not scopes:
        out.print(f"Nothing is stored in {where}.")
    for scope in scopes:
        with err.status(f"Reading {scope.prefix}") as status:

            def say(seen: int, note: Any = status) -> None:
                note.update(f"{seen} objects read")

            found = rebuild(store, scope, say)
        out.print(f"{scope.namespace}, model {scope.model}: {found} objects recorded")
