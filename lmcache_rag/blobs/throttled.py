"""A store whose reads are slowed down, to see what a slow one does."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from lmcache_rag.blobs.base import Store

PAUSE_S = 0.5
"""A read so long after the last one begins anew."""


@dataclass(frozen=True)
class Throttle:
    """How fast a store is read.

    Attributes:
        bytes_per_s: at first.
        then_bytes_per_s: from `change_bytes` on, counted from the first read after a pause; None for no change.
    """

    bytes_per_s: Annotated[float, Field(gt=0.0)]
    then_bytes_per_s: Annotated[float, Field(gt=0.0)] | None = None
    change_bytes: Annotated[int, Field(ge=0)] = 0


class ThrottledStore:
    """Another store, read so fast at most by all threads together. All else is passed through."""

    def __init__(self, store: Store, throttle: Throttle) -> None:
        self._store = store
        self._throttle = throttle
        self._lock = threading.Lock()
        self._since_pause = 0
        self._ended = 0.0

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        with self._lock:
            if time.monotonic() - self._ended > PAUSE_S:
                self._since_pause = 0
            data = self._store.read(name, start, length)
            time.sleep(self._seconds(len(data or b"")))
            self._ended = time.monotonic()
            return data

    def _seconds(self, length: int) -> float:
        """How long reading so many bytes takes, which may span the change."""
        throttle = self._throttle
        if throttle.then_bytes_per_s is None:
            return length / throttle.bytes_per_s
        before = min(length, max(0, throttle.change_bytes - self._since_pause))
        self._since_pause += length
        return before / throttle.bytes_per_s + (length - before) / throttle.then_bytes_per_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)
