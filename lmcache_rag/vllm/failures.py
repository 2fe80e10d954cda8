"""What is done with an exception that costs one request its blend, and nobody anything else."""

from __future__ import annotations

import logging
import traceback

_log = logging.getLogger(__name__)


class Failures:
    """Logs each kind of failure once, with its traceback. A kind is an exception's type and the line that raised it."""

    def __init__(self) -> None:
        self._logged: set[tuple[type[Exception], str, int | None]] = set()

    def note(self, doing: str, error: Exception) -> str:
        """Log that `doing` failed, where this kind is new; returns the failure's name for the report."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = (type(error), place.filename, place.lineno)
        if kind not in self._logged:
            self._logged.add(kind)
            _log.error("%s failed, and vLLM goes on without it (this kind is not logged again)", doing, exc_info=error)
        return type(error).__name__
