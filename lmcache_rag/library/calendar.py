"""When a store was in use, so that how long something was not used is counted in that time, not in a clock's alone."""

from __future__ import annotations

import numpy as np

from lmcache_rag.blobs.base import Store

_DAY_S = 24 * 3600

_MARKS = 4096
"""So many are kept: of eleven years."""


class Calendar:
    """A namespace's marks in a store, `.days/<namespace>/<seconds>/<number>`: one for each day, or half the time that
    things are kept where that is less, in which something was stored.

    A clock that is set wrong makes one mark, wherever it is set to. So what is deleted after ten days was not used on
    ten days on which the store was, as far as any clock knows.

    Args:
        kept_s: what was not used for so long is to be deleted.
    """

    def __init__(self, store: Store, namespace: str, kept_s: float) -> None:
        self.span_s = max(1, int(min(_DAY_S, kept_s / 2)))
        self._store = store
        self._folder = f".days/{namespace}/{self.span_s}/"

    def mark(self, now: int) -> None:
        """The store is in use. Raises `StoreError`."""
        self._store.write_if_absent(f"{self._folder}{now // self.span_s:012}", [b""])
        self._store.delete(f"{self._folder}{number:012}" for number in self._numbers()[:-_MARKS])

    def ages(self, used_s: np.ndarray, now: int) -> np.ndarray:
        """Seconds since each was used, as far as the store was in use. A use in the future was now.

        Raises:
            StoreError: the store cannot be read.
        """
        used = np.clip(used_s, 0, now)
        marked = np.array([self.span_s * number for number in self._numbers()], np.int64)
        times = np.unique(np.concatenate([marked[marked <= now], used, [now]]))
        elapsed = np.concatenate([[0.0], np.cumsum(np.minimum(np.diff(times), self.span_s))])
        return elapsed[-1] - elapsed[np.searchsorted(times, used)]

    def _numbers(self) -> list[int]:
        return sorted(int(name) for name in self._store.folders(self._folder) if name.isdigit())
