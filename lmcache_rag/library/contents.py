"""What a store holds, in figures and as a list."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import RESIDUAL, KVScope, base_of, codec_in
from lmcache_rag.library.names import is_chats
from lmcache_rag.library.room import PINNED, PREAMBLE
from lmcache_rag.library.scopes import recorded_scopes
from lmcache_rag.records.merge import Live
from lmcache_rag.records.records import Records


@dataclass(frozen=True)
class Selection:
    """Which scopes of a store are meant; None for all.

    Attributes:
        namespace: its conversations included.
    """

    namespace: str | None = None
    model: str | None = None

    def of(self, store: Store) -> list[tuple[KVScope, Records]]:
        """Those scopes, and what is recorded of them now. Raises `StoreError`."""
        found = []
        for scope in recorded_scopes(store):
            names = (scope.namespace, scope.namespace.partition(".")[0])
            if self.namespace not in (None, *names) or self.model not in (None, scope.model):
                continue
            records = Records(store, scope)
            records.refresh()
            found.append((scope, records))
        return found


def figures(store: Store, scope: KVScope, records: Records) -> dict[str, Any]:
    """Of one scope, as `store stat` shows them. Raises `StoreError`."""
    found = records.live()
    used = found.used_s[found.used_s > 0]
    pinned = found.held_chunk[found.owner == np.uint64(PINNED)]
    return {
        "namespace": scope.namespace,
        "model": scope.model,
        "chunks": len(np.unique(found.chunk)),
        "objects": len(found.chunk),
        "tokens": int(found.tokens[np.unique(found.chunk)].sum()),
        "bytes": int(found.size_bytes.sum()),
        "bytes_by_codec": _summed(found, lambda form: RESIDUAL if base_of(form) else codec_in(form)),
        "bytes_by_kind": _summed(found, lambda form: _kind(form, is_chats(scope.namespace))),
        "owners": len(set(found.owner.tolist()) - {PINNED}),
        "pinned_chunks": len(np.unique(pinned)),
        "oldest_use": _time(int(used.min())) if len(used) else None,
        "newest_use": _time(int(used.max())) if len(used) else None,
        "records_bytes": sum(part.size_bytes for part in records.parts),
        "tables_bytes": sum(
            store.size(f".tables/{scope.model}/{name}") or 0 for name in store.folders(f".tables/{scope.model}/")
        ),
    }


def listed(scope: KVScope, records: Records, owner: int | None = None) -> Iterator[dict[str, Any]]:
    """The chunks of one scope, as `store ls` shows them: those used last first.

    Args:
        owner: whose.
    """
    found = records.live()
    latest = np.zeros(len(found.tokens), np.int64)
    np.maximum.at(latest, found.chunk, found.used_s)
    chunks = np.unique(found.chunk)
    if owner is not None:
        chunks = np.intersect1d(chunks, found.held_chunk[found.owner == np.uint64(owner)])
    for chunk in chunks[np.argsort(-latest[chunks], kind="stable")].tolist():
        key = found.key(chunk)
        variants, owners = records.variants(key), records.owners(key)
        yield {
            "namespace": scope.namespace,
            "key": key.hex(),
            "tokens": int(found.tokens[chunk]),
            "forms": sorted(variants),
            "bytes": sum(row.size_bytes for row in variants.values()),
            "last_use": _time(int(latest[chunk])) if latest[chunk] else None,
            "owners": sorted(f"{each:016x}" for each in owners - {PINNED}),
            "pinned": PINNED in owners,
        }


def _summed(found: Live, name: Any) -> dict[str, int]:
    sums: dict[str, int] = {}
    for number, form in enumerate(found.forms):
        own = int(found.size_bytes[found.form == number].sum())
        if own:
            sums[name(form)] = sums.get(name(form), 0) + own
    return dict(sorted(sums.items()))


def _kind(form: str, chats: bool) -> str:
    if chats:
        return "conversation"
    if form == PREAMBLE:
        return "preamble"
    return "primed" if "-" in form.partition(".")[0] else "unprimed"


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))
