"""Forks: a child gets copies of locks that nobody releases, and of queues that no thread of its own serves."""

from __future__ import annotations

import os

from lmcache_rag.errors import EngineError, LmcacheRagError


class OwnProcess:
    """The process in which something was made that holds threads, locks or open files.

    Args:
        what: it is, with a capital letter.
    """

    def __init__(self, what: str, error: type[LmcacheRagError] = EngineError) -> None:
        self._what = what
        self._error = error
        self._pid = os.getpid()

    def is_here(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise the error where this is a fork of that process."""
        if not self.is_here():
            raise self._error(
                f"{self._what} belongs to the process {self._pid}, of which this one is a fork: use it there only, or "
                "start processes by `spawn` (multiprocessing.get_context('spawn')) and make one in each."
            )
