"""Copying a store, or a namespace of it, into another one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope, base_of
from lmcache_rag.codec.container import check
from lmcache_rag.errors import CorruptObjectError, StoreError
from lmcache_rag.library.names import object_name
from lmcache_rag.records.part import OwnerRow, VariantRow
from lmcache_rag.records.records import Records

_BATCH = 256
"""So many chunks are copied before they are recorded."""

_log = logging.getLogger(__name__)


@dataclass
class Copied:
    """What became of the objects of a copy: `present` ones were there already, `left_out` ones are damaged or gone."""

    objects: int = 0
    size_bytes: int = 0
    present: int = 0
    left_out: int = 0


def copy_tables(source: Store, target: Store, model: str) -> None:
    """Copy a model's codec tables. Raises `StoreError`."""
    for name in source.folders(f".tables/{model}/"):
        path = f".tables/{model}/{name}"
        if not target.exists(path) and (data := source.read(path)) is not None:
            target.write(path, [data])


def copy_scope(
    source: Store, target: Store, scope: KVScope, records: Records, progress: Callable[[int], Any] | None = None
) -> Copied:
    """Copy what is recorded of one scope, with times of use, owners and pins. What is there already stays, so that a
    copy that was interrupted goes on.

    Args:
        progress: gets the number of objects done.

    Raises:
        StoreError: either store fails.
    """
    copied, own = Copied(), Records(target, scope)
    own.refresh()
    live = records.live()
    chunks = np.unique(live.chunk).tolist()
    for start in range(0, len(chunks), _BATCH):
        tokens: dict[bytes, np.ndarray] = {}
        rows: list[VariantRow] = []
        owners: list[OwnerRow] = []
        for chunk in chunks[start : start + _BATCH]:
            key = live.key(chunk)
            ids = records.tokens(key)
            new = _copy_objects(source, target, scope, records.variants(key).values(), own.variants(key), copied)
            if new and ids is not None:
                tokens[key] = ids
                rows += new
            held = records.owners(key) - own.owners(key)
            owners += [OwnerRow(key, owner, held=True) for owner in held if new or own.variants(key)]
            if progress is not None:
                progress(copied.objects + copied.present + copied.left_out)
        if rows or owners:
            own.add(tokens, rows, owners)
    return copied


def _copy_objects(
    source: Store,
    target: Store,
    scope: KVScope,
    rows: Iterable[VariantRow],
    there: dict[str, VariantRow],
    copied: Copied,
) -> list[VariantRow]:
    """Copy a chunk's objects, residuals after what they are against; returns the rows to be recorded."""
    new: list[VariantRow] = []
    for row in sorted(rows, key=lambda row: bool(base_of(row.form))):
        name, base = object_name(scope, row.key, row.form), base_of(row.form)
        if row.form in there and target.size(name) == row.size_bytes:
            copied.present += 1
            continue
        data = source.read(name)
        problem = "it is gone" if data is None else _problem(name, data)
        if base and not problem and base not in there and all(base != each.form for each in new):
            problem = "what it is a residual against is left out"
        if data is None or problem:
            copied.left_out += 1
            _log.warning("%s is left out (%s)", name, problem)
            continue
        if target.write(name, [data]) != row.size_bytes:
            raise StoreError(
                f"{name} has another size than is recorded: run `lmcache-rag store verify --repair` first."
            )
        copied.objects += 1
        copied.size_bytes += row.size_bytes
        new.append(row)
    return new


def _problem(name: str, data: memoryview) -> str:
    try:
        found = check(data).header.name
    except CorruptObjectError as error:
        return str(error)
    return "" if found == name else f"it is {found}"
