"""The command line of what looks after a store: `lmcache-rag store`."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lmcache_rag.blobs.uri import open_existing, open_store
from lmcache_rag.errors import StoreError
from lmcache_rag.library.contents import Selection, figures, listed
from lmcache_rag.terminal import err, out, show_rows

store_app = typer.Typer(no_args_is_help=True, help="Look after a KV store.")

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="The KV store, such as INDEX/kv.")]
NamespaceOption = Annotated[Optional[str], typer.Option(help="Of this namespace and its conversations only.")]
ModelOption = Annotated[Optional[str], typer.Option(help="Of the model of this fingerprint only, as `stat` shows it.")]
OwnerOption = Annotated[Optional[str], typer.Option(help="Of this owner only: an index's folder, or as `ls` shows it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@store_app.command("stat")
def stat_command(
    location: StoreArgument,
    namespace: NamespaceOption = None,
    model: ModelOption = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also look for bytes that no record names.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How much is stored, of whom, and when it was used."""
    from lmcache_rag.library.verify import recorded_names, unrecorded

    store, rows = open_existing(location), []
    for scope, records in Selection(namespace, model).of(store):
        row = figures(store, scope, records)
        if deep:
            there = list(store.list(scope.prefix))
            records.refresh()
            names = unrecorded(there, recorded_names(scope, records))
            row["unreferenced_bytes"] = sum(store.size(name) or 0 for name in names)
        rows.append(row)
    show(rows, as_json=as_json)


@store_app.command("ls")
def ls_command(
    location: StoreArgument,
    namespace: NamespaceOption = None,
    model: ModelOption = None,
    owner: OwnerOption = None,
    limit: Annotated[int, typer.Option(min=1, help="So many at most, those used last first in each namespace.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """The stored chunks: tokens, forms, bytes, last use and owners."""
    number = None if owner is None else _owner(owner)
    scopes = Selection(namespace, model).of(open_existing(location))
    rows = (row for scope, records in scopes for row in listed(scope, records, number))
    show(list(islice(rows, limit)), as_json=as_json)


@store_app.command("verify")
def verify_command(
    location: StoreArgument,
    namespace: NamespaceOption = None,
    model: ModelOption = None,
    sample: Annotated[Optional[int], typer.Option(min=1, help="Read so many objects of each scope only.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Delete what is damaged: it is computed again.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read all objects and compare them with their checksums and records. Exit code 1 where something is damaged."""
    from lmcache_rag.library.verify import verify

    store, rows, bad = open_existing(location), [], False
    for scope, records in Selection(namespace, model).of(store):
        with err.status(f"Reading {scope.prefix}") as status:

            def say(seen: int, note: Any = status, prefix: str = scope.prefix) -> None:
                note.update(f"{prefix}: {seen} objects read")

            found = verify(store, scope, records, sample=sample, repair=repair, progress=say)
        bad = bad or bool(found.damaged or found.missing)
        rows.append({"namespace": scope.namespace, "model": scope.model, **asdict(found)})
        if not as_json:
            for name, problem in (*found.damaged.items(), *((name, "it is gone") for name in found.missing)):
                out.print(f"{name}: {problem}")
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        counted = ("damaged", "missing", "unrecorded")
        show([{**row, **{name: len(row[name]) for name in counted}} for row in rows], as_json=False)
    if bad:
        raise typer.Exit(1)


@store_app.command("gc")
def gc_command(
    location: StoreArgument,
    ttl: Annotated[Optional[float], typer.Option(min=0, help="Days; chunks not used for longer are deleted.")] = None,
    conversations_ttl: Annotated[float, typer.Option(min=0, help="Days; the same of conversations.")] = 7.0,
    grace_s: Annotated[
        float, typer.Option(min=0, help="Seconds: an object that is not recorded by then, no writer is storing now.")
    ] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete what no record names, and what was not used for long."""
    from lmcache_rag.library.garbage import collect
    from lmcache_rag.library.room import DAY_S, Limits

    limits = Limits(None, None if ttl is None else ttl * DAY_S, conversations_ttl * DAY_S)
    with err.status("Looking") as status:

        def wait() -> None:
            status.update(f"waiting {grace_s:g} s for what is being stored")
            time.sleep(grace_s)

        found = collect(open_existing(location), limits, wait=wait, dry_run=dry_run, progress=status.update)
    show([asdict(found) if as_json else {name: len(names) for name, names in asdict(found).items()}], as_json=as_json)


@store_app.command("rm")
def rm_command(
    location: StoreArgument,
    namespace: NamespaceOption = None,
    model: ModelOption = None,
    owner: OwnerOption = None,
    key: Annotated[Optional[str], typer.Option(help="Of the chunk of this key only, as `ls` shows it.")] = None,
    unused_since: Annotated[Optional[float], typer.Option(min=0, help="What was not used for so many days.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete chunks, whoever owns them. All that is asked for has to hold of a chunk."""
    from lmcache_rag.library.removing import matching, remove

    if all(each is None for each in (namespace, model, owner, key, unused_since)):
        raise StoreError("Say what to delete: --namespace, --model, --owner, --key or --unused-since.")
    store = open_existing(location)
    before = None if unused_since is None else time.time() - 86400 * unused_since
    found = {
        scope: matching(records, owner=None if owner is None else _owner(owner), key=key, before=before)
        for scope, records in Selection(namespace, model).of(store)
    }
    count = sum(map(len, found.values()))
    if count and not yes and not typer.confirm(f"Delete {count} chunks?"):
        raise typer.Exit(1)
    removed = Counter(chunks=count, bytes=sum(remove(store, scope, keys) for scope, keys in found.items()))
    show([dict(removed)], as_json=as_json)


@store_app.command("cp")
def cp_command(
    location: StoreArgument,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The store to copy into.")],
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a store, or a namespace of it: objects, codec tables, records, owners and pins. Run again, it goes on."""
    from lmcache_rag.library.copying import copy_scope, copy_tables

    source, rows = open_existing(location), []
    copy = open_store(target)
    for scope, records in Selection(namespace).of(source):
        copy_tables(source, copy, scope.model)
        with err.status(f"Copying {scope.prefix}") as status:

            def say(done: int, note: Any = status, prefix: str = scope.prefix) -> None:
                note.update(f"{prefix}: {done} objects done")

            copied = copy_scope(source, copy, scope, records, say)
        rows.append({"namespace": scope.namespace, "model": scope.model, **asdict(copied)})
    show(rows, as_json=as_json)
    if any(row["left_out"] for row in rows):
        raise typer.Exit(1)


@store_app.command("pin")
def pin_command(location: StoreArgument, keys: list[str], namespace: NamespaceOption = None) -> None:
    """Keep chunks, named by their keys, from being evicted."""
    _pin(location, keys, namespace, held=True)


@store_app.command("unpin")
def unpin_command(location: StoreArgument, keys: list[str], namespace: NamespaceOption = None) -> None:
    """Let chunks be evicted again."""
    _pin(location, keys, namespace, held=False)


@store_app.command("rebuild")
def rebuild_command(location: StoreArgument) -> None:
    """Make the records of what is stored anew from the stored objects, where they are lost or damaged."""
    from lmcache_rag.library.rebuild import rebuild
    from lmcache_rag.library.scopes import scopes_of

    store = open_existing(location)
    scopes = scopes_of(store)
    if not scopes:
        out.print(f"Nothing is stored in {location}.")
    for scope in scopes:
        with err.status(f"Reading {scope.prefix}") as status:

            def say(seen: int, note: Any = status) -> None:
                note.update(f"{seen} objects read")

            found = rebuild(store, scope, say)
        out.print(f"{scope.namespace}, model {scope.model}: {found} objects recorded")


def _pin(location: str, keys: list[str], namespace: str | None, *, held: bool) -> None:
    from lmcache_rag.library.removing import known, pin

    store, wanted, count = open_existing(location), [_key(key) for key in keys], 0
    for scope, records in Selection(namespace).of(store):
        found = known(records, wanted)
        pin(store, scope, found, held=held)
        count += len(found)
    out.print(f"{count} chunks {'pinned' if held else 'unpinned'}")
    if not count:
        raise typer.Exit(1)


def _owner(named: str) -> int:
    """The number of an owner: an index's folder, the number as `ls` shows it, or its name."""
    from lmcache_rag.records.records import owner_number

    manifest = Path(named).expanduser() / "manifest.json"
    if manifest.is_file():
        return owner_number(str(json.loads(manifest.read_text())["owner"]))
    try:
        return int(named, 16) if len(named) == 16 else owner_number(named)
    except ValueError:
        return owner_number(named)


def _key(digits: str) -> bytes:
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise StoreError(f"{digits!r} is no chunk's key: give one as `lmcache-rag store ls --json` shows it.") from None


def show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        show_rows(rows)
    else:
        out.print("Nothing is stored.")
