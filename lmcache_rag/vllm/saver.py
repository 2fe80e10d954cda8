"""The thread that stores what was computed, so that no step of vLLM's waits for a store."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from lmcache_rag.errors import EngineError

Result = TypeVar("Result")

_PATIENCE_S = 30.0
"""A store that does not answer for so long when the engine closes is waited for no longer."""

_log = logging.getLogger(__name__)


class Saver:
    """Does what is submitted in one thread, in order. The thread does not outlive the process, as those of
    `ThreadPoolExecutor` do: a store that hangs holds up no exit."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="lmcache-rag-save", daemon=True)
        self._closed = False
        self._thread.start()

    def submit(self, save: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have `save(*arguments)` done. Raises `EngineError` where this is closed."""
        if self._closed:
            raise EngineError("The engine is closed, so nothing is stored any more.")
        saved: Future[Result] = Future()

        def work() -> None:
            try:
                saved.set_result(save(*arguments))
            except BaseException as error:  # noqa: BLE001  # whoever asks for the result gets it
                saved.set_exception(error)

        self._waiting.put(work)
        return saved

    def close(self, *last: Callable[[], None], patience_s: float = _PATIENCE_S) -> None:
        """Wait for what was submitted, and `last` after it, but not for a store that hangs; a log says where that was
        so. Closing again does nothing."""
        if self._closed:
            return
        for work in last:
            self.submit(work)
        self._closed = True
        self._waiting.put(None)
        self._thread.join(patience_s)
        if self._thread.is_alive():
            _log.warning(
                "the store did not answer within %.0f s, so what was to be stored last may be missing and is computed "
                "again when it is wanted",
                patience_s,
            )

    def _serve(self) -> None:
        while (work := self._waiting.get()) is not None:
            work()
