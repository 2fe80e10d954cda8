"""A store whose reads are slowed down, to see what a slow one does."""

from __future__ import annotations

import threading
import time
from typing import Any

from lmcache_rag.store.base import Store


class ThrottledStore:
    """Another store, of which `bytes_per_s` at most are read, by all threads together. All else is passed through."""

    def __init__(self, store: Store, bytes_per_s: float) -> None:
        self._store = store
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()

    def read(self, name: str, limit_bytes: int | None = None) -> memoryview | None:
        with self._lock:
            data = self._store.read(name, limit_bytes)
            time.sleep(len(data or b"") / self._bytes_per_s)
            return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)
