"""Ctrl-C while something starts that cannot be stopped half way."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit code of what Ctrl-C has ended."""

_SHOW_CURSOR = "\x1b[?25h"


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """While the context lasts, Ctrl-C ends the process there and then, with exit code 130. vLLM takes half a minute to
    start and cannot be told to stop; nothing is stored meanwhile. Only for the main thread of a command."""
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*_: Any) -> NoReturn:
    note = "\nInterrupted.\n"
    os.write(2, ((_SHOW_CURSOR if sys.stderr.isatty() else "") + note).encode())
    os._exit(INTERRUPTED)
