"""Following a log over a network from a thread of its own."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

from lmcache_rag.errors import StoreError

_EVERY_S = 0.3
_RECENT_S = 10.0
"""A view that may wait is followed less often when nobody used it for so long: each time after twice the pause,"""
_SELDOM_S = 5.0
"""up to this one."""

_UNUSED_S = 300.0
"""Nothing is asked for a view that nobody used for so long."""


class Follower:
    """Calls a view's `refresh` several times a second, for as long as somebody looks at the view now and then.

    Args:
        refresh: a bound method. Its object is held only while it is called, and may go at any time.
        patient: whether less often while nobody looks.
    """

    def __init__(self, refresh: Callable[[], None], *, patient: bool = False) -> None:
        self._patient = patient
        self._refresh = weakref.WeakMethod(refresh)
        self._used = 0.0
        self._error: StoreError | None = None
        self._running = False
        self._asked = threading.Event()
        self._lock = threading.Lock()

    def look(self) -> None:
        """Go on following; raises the `StoreError` of the last try where it failed."""
        with self._lock:
            if time.monotonic() - self._used > _RECENT_S:
                self._asked.set()
            self._used = time.monotonic()
            if not self._running:
                thread = threading.Thread(target=self._follow, name="lmcache-rag-follow", daemon=True)
                thread.start()
                self._running = True
        if (error := self._error) is not None:
            raise StoreError(str(error))

    def _follow(self) -> None:
        pause_s = _EVERY_S
        while True:
            refresh = self._refresh()
            with self._lock:
                if refresh is None or time.monotonic() - self._used > _UNUSED_S:
                    self._running = False
                    return
            try:
                refresh()
            except StoreError as error:
                self._error = error
            except Exception as error:  # noqa: BLE001  # it goes on, and who looks is told
                self._error = StoreError(f"the records cannot be followed ({type(error).__name__}: {error})")
            else:
                self._error = None
            del refresh
            unused = self._patient and time.monotonic() - self._used > _RECENT_S
            pause_s = min(2 * pause_s, _SELDOM_S) if unused else _EVERY_S
            self._asked.wait(pause_s)
            self._asked.clear()
