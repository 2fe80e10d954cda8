"""How fast a store is written and read: objects as large as a passage's KV, one after another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.errors import StoreError

_BLOB_BYTES = 3 << 20
_BLOBS = 24
_FIRST_BYTES = 32 << 10


def tier_rates(store: Store) -> dict[str, Any]:
    """`put_mb_s` and `get_mb_s`, medians; and `first_byte_ms`, what reading an object's first bytes takes.

    Raises:
        StoreError: the store fails, or does not give back what it was given.
    """
    content = np.random.default_rng(0).bytes(_BLOB_BYTES)
    names = [f"bench/{number:03}" for number in range(_BLOBS)]
    put = [_seconds(lambda name=name: store.write(name, [content])) for name in names]  # type: ignore[misc]
    first = [_seconds(lambda name=name: store.read(name, 0, _FIRST_BYTES)) for name in names]  # type: ignore[misc]
    get = [_seconds(lambda name=name: store.read(name)) for name in names]  # type: ignore[misc]
    if store.read(names[-1]) != content:
        raise StoreError("The store does not give back what it was given.")
    store.delete(names)
    return {
        "put_mb_s": round(_BLOB_BYTES / 1e6 / statistics.median(put), 1),
        "get_mb_s": round(_BLOB_BYTES / 1e6 / statistics.median(get), 1),
        "first_byte_ms": round(1e3 * statistics.median(first), 2),
    }


def _seconds(do: Callable[[], Any]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start
