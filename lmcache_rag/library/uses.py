"""Recording what is used, so that eviction on any engine knows what others need."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from lmcache_rag.errors import StoreError
from lmcache_rag.records.records import Records

INTERVAL_S = 3600
"""A use so soon after the last recorded one is not recorded."""

_WAIT_S = 30.0
"""Uses wait so long for others, to be recorded together."""

_log = logging.getLogger(__name__)


class Uses:
    """The uses of one scope's objects, recorded by a thread of its own. A store that may only be read records none.

    Args:
        interval_s: see `INTERVAL_S`.
    """

    def __init__(
        self,
        records: Records,
        interval_s: float = INTERVAL_S,
        wait_s: float = _WAIT_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._records = records
        self._interval_s = interval_s
        self._wait_s = wait_s
        self._clock = clock
        self._waiting: dict[tuple[bytes, str], int] = {}
        self._refused_until_s = 0.0
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def note(self, key: bytes, form: str) -> None:
        """An object was used now. Reads memory only. A time in the future, of a clock that was wrong, is put right."""
        now = int(self._clock())
        if now < self._refused_until_s or (key, form) in self._waiting:
            return
        row = self._records.variants(key).get(form)
        if row is None or 0 <= now - row.used_s < self._interval_s:
            return
        with self._lock:
            self._waiting[key, form] = now
            if self._timer is None:
                self._timer = threading.Timer(self._wait_s, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Record the uses that wait."""
        with self._lock:
            waiting, self._waiting, self._timer = self._waiting, {}, None
        if not waiting:
            return
        try:
            self._records.use(waiting)
        except StoreError as error:
            self._refused_until_s = self._clock() + self._interval_s
            _log.info("what is used of the store is not recorded for a while (%s)", error)
