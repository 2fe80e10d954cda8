"""Reading all that is stored, to see whether it is what is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope
from lmcache_rag.codec.container import FORMAT_VERSION, check
from lmcache_rag.errors import CorruptObjectError
from lmcache_rag.library.names import object_name, parsed
from lmcache_rag.library.reading import read_index
from lmcache_rag.records.records import Records


@dataclass
class Findings:
    """What was found in one scope: names of objects.

    Attributes:
        damaged: name -> what is wrong.
        missing: recorded, and not there.
        unrecorded: there, and not recorded: a writer died, or is at work.
    """

    checked: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)


def verify(
    store: Store,
    scope: KVScope,
    records: Records,
    *,
    sample: int | None = None,
    repair: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> Findings:
    """Read every recorded object, and look for those that are not recorded.

    Args:
        sample: read so many only, drawn at random, and list nothing.
        repair: record that what is damaged or missing is gone, and delete it, so that it is computed again.
        progress: gets the number of objects read.

    Raises:
        StoreError: the store cannot be read, or not be repaired.
    """
    found, recorded = Findings(), recorded_names(scope, records)
    names = list(recorded)
    if sample is not None and sample < len(names):
        names = [names[number] for number in np.random.default_rng().choice(len(names), sample, replace=False)]
    for name in names:
        key, form = recorded[name]
        problem = _looked_at(store, scope, records, name, key, form)
        if problem is None:
            found.missing.append(name)
        elif problem:
            found.damaged[name] = problem
        found.checked += 1
        if progress is not None:
            progress(found.checked)
    there = list(store.list(scope.prefix)) if sample is None else []
    records.refresh()
    now = recorded_names(scope, records)  # others may have deleted and stored meanwhile
    found.damaged = {name: problem for name, problem in found.damaged.items() if name in now}
    found.missing = [name for name in found.missing if name in now]
    found.unrecorded = unrecorded(there, now)
    lost = [*found.damaged, *found.missing]
    if repair:  # what was stored anew since it was read is whole
        lost = [name for name in lost if _looked_at(store, scope, records, name, *recorded[name]) != ""]
    if repair and lost:
        gone = records.drop([recorded[name] for name in lost], int(time.time()))
        store.delete({*lost, *(object_name(scope, row.key, row.form) for row in gone)})
    return found


def recorded_names(scope: KVScope, records: Records) -> dict[str, tuple[bytes, str]]:
    """The names of all recorded objects, with their chunks' keys and forms."""
    live = records.live()
    rows = [(live.key(chunk), live.forms[form]) for chunk, form in zip(live.chunk, live.form, strict=True)]
    return {object_name(scope, *row): row for row in rows}


def unrecorded(names: Iterable[str], recorded: dict[str, tuple[bytes, str]]) -> list[str]:
    """Those of a scope's objects that are not recorded, but those of later releases.

    Args:
        names: listed before the records were read, since objects are stored before they are recorded.
    """
    return [name for name in names if name not in recorded and not _is_later(name)]


def _is_later(name: str) -> bool:
    try:
        return parsed(name)[2] > FORMAT_VERSION
    except (ValueError, IndexError):
        return False


def _looked_at(store: Store, scope: KVScope, records: Records, name: str, key: bytes, form: str) -> str | None:
    """What is wrong with an object, or nothing; None where it is not there."""
    data = store.read(name)
    if data is None:
        return None
    return _problem(name, data, records, key, form) or _base_problem(store, scope, records, key, data)


def _problem(name: str, data: memoryview, records: Records, key: bytes, form: str) -> str:
    """What is wrong with an object, or nothing."""
    try:
        index = check(data)
    except CorruptObjectError as error:
        return str(error)
    tokens, row = records.tokens(key), records.variants(key).get(form)
    if index.header.name != name:
        return f"it is {index.header.name}"
    if tokens is None or not np.array_equal(tokens, index.token_ids):
        return "its tokens are not those that are recorded"
    if row is not None and row.size_bytes != len(data):
        return f"it has {len(data)} bytes, and {row.size_bytes} are recorded"
    return ""


def _base_problem(store: Store, scope: KVScope, records: Records, key: bytes, data: memoryview) -> str:
    """What is wrong with a residual because of what it is to be added to, or nothing. A base that is damaged itself is
    reported under its own name."""
    base = check(data).header.base
    if base is None:
        return ""
    if base.form not in records.variants(key):
        return "what it is a residual against is gone"
    try:
        read = read_index(store, object_name(scope, key, base.form))
    except CorruptObjectError:
        return ""
    return "" if read is None or read[0].checksum == base.checksum else "it is a residual against another object"
