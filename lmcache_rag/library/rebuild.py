"""Making a store's records anew from its objects, where they were lost or do not tell the truth."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope
from lmcache_rag.codec.container import FORMAT_VERSION
from lmcache_rag.errors import CorruptObjectError
from lmcache_rag.library.reading import read_index
from lmcache_rag.records.part import Part, VariantRow, build
from lmcache_rag.records.records import Records

_BATCH = 4096
"""So many chunks are read before they become a part."""

_log = logging.getLogger(__name__)


def rebuild(store: Store, scope: KVScope, progress: Callable[[int], Any] | None = None) -> int:
    """Record what is stored, and nothing else; owners are forgotten, since only the records know them, and come back
    when their indexes are next updated. Returns the number of objects.

    Args:
        progress: gets the number of objects looked at.

    Raises:
        StoreError: the store cannot be read or written to.
    """
    found = 0
    records = Records(store, scope)
    records.refresh()  # refuses what a later release recorded

    def parts() -> Iterator[Part]:
        nonlocal found
        tokens: dict[bytes, np.ndarray] = {}
        rows: list[VariantRow] = []
        for number, name in enumerate(store.list(scope.prefix), start=1):
            row = _row(store, name, tokens)
            if row is not None:
                rows.append(row)
                found += 1
            if progress is not None:
                progress(number)
            if len(tokens) >= _BATCH:
                yield build(tokens, rows)
                tokens, rows = {}, []
        yield build(tokens, rows)

    records.restart(parts())
    return found


def _row(store: Store, name: str, tokens: dict[bytes, np.ndarray]) -> VariantRow | None:
    """The record of an object, whose chunk's tokens are added; None where it is none, or damaged."""
    stem, _, version = name.rpartition(".v")
    if version != str(FORMAT_VERSION):
        return None
    *_, digits, form = stem.split("/")
    try:
        key = bytes.fromhex(digits)
        size = store.size(name)
        read = read_index(store, name)
    except (CorruptObjectError, ValueError) as error:
        _log.warning("%s is left out (%s)", name, error)
        return None
    if read is None or size is None:
        return None
    tokens.setdefault(key, read[0].token_ids.copy())  # not the whole of what was read
    return VariantRow(key, form, size, int(time.time()))
