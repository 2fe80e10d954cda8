"""What no record names: objects of writers that died, of earlier formats, and tables that nothing was coded with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope, codec_in
from lmcache_rag.codec import CODECS
from lmcache_rag.errors import StoreError
from lmcache_rag.library.names import beside, object_name
from lmcache_rag.library.room import Limits, Room
from lmcache_rag.library.scopes import scopes_of
from lmcache_rag.library.verify import recorded_names, unrecorded
from lmcache_rag.records.records import Records


@dataclass
class Garbage:
    """Names of what is not needed.

    Attributes:
        unrecorded: objects without a record.
        expired: objects that were not used for longer than they are to be kept.
        tables: codec tables that are neither the last ones of their model nor needed by anything that is stored.
    """

    unrecorded: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


def collect(
    store: Store,
    limits: Limits,
    *,
    wait: Callable[[], Any],
    dry_run: bool = False,
    progress: Callable[[str], Any] = lambda _note: None,
) -> Garbage:
    """Find what is not needed, and delete it. How long something was not used is what the clock says.

    Args:
        wait: called between two looks at what is not recorded: objects that are being stored are not recorded yet, and
            only what is not at both looks is deleted.
        dry_run: find it only.

    Raises:
        StoreError: the store cannot be read or written to, or some of its records are lost, so that nobody can tell
            what is not needed.
    """
    found, scopes = Garbage(), scopes_of(store)
    for namespace in dict.fromkeys(beside(scope.namespace) for scope in scopes):
        progress(f"looking for what has expired in {namespace}")
        room = Room(store, namespace, limits)
        room.look()
        for stored, old in room.expired(by_clock=True):
            live = stored.live
            found.expired += [
                object_name(stored.scope, live.key(live.chunk[number]), live.forms[live.form[number]]) for number in old
            ]
        if not dry_run:
            room.expire(by_clock=True)
    first = {scope: set(_unrecorded(store, scope, progress)) for scope in scopes}
    if any(first.values()):
        wait()
        for scope, names in first.items():
            if names:
                still = sorted(names.intersection(_unrecorded(store, scope, progress)))
                found.unrecorded += still
                if not dry_run:
                    store.delete(still)  # at once, before they can be recorded
    found.tables = _unused_tables(store, scopes)
    if not dry_run:
        store.delete(found.tables)
    return found


def _unrecorded(store: Store, scope: KVScope, progress: Callable[[str], Any]) -> list[str]:
    progress(f"listing {scope.prefix}")
    names = list(store.list(scope.prefix))
    records = Records(store, scope)
    records.refresh()
    found = unrecorded(names, recorded_names(scope, records))
    if found and not records.is_whole:
        raise StoreError(
            f"Some records of {scope.prefix} are lost or damaged, and what they named would be deleted: run "
            "`lmcache-rag store rebuild` first."
        )
    return found


def _unused_tables(store: Store, scopes: Sequence[KVScope]) -> list[str]:
    """Earlier tables of models of which nothing is stored that was coded with any."""
    in_use = set()
    for scope in scopes:
        records = Records(store, scope)
        records.refresh()
        live = records.live()
        codecs = {codec_in(live.forms[form]) for form in set(live.form.tolist())}
        if any(codec not in CODECS or CODECS[codec].learned for codec in codecs):
            in_use.add(scope.model)
    unused: list[str] = []
    for model in store.folders(".tables/"):
        if model not in in_use:
            names = sorted(name for name in store.folders(f".tables/{model}/") if name.partition(".")[0].isdigit())
            unused += [f".tables/{model}/{name}" for name in names[:-1]]
    return unused
