"""An index and its engine, as commands open them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.cli.interrupts import leaving_at_once
from lmcache_rag.errors import PromptError
from lmcache_rag.terminal import err

if TYPE_CHECKING:
    from lmcache_rag.corpus import Corpus, IndexSettings
    from lmcache_rag.engine import Engine, LocalEngine


@contextmanager
def started(folder: Path, settings: IndexSettings, **options: Any) -> Iterator[tuple[LocalEngine, Corpus]]:
    """See `open_corpus`. A note is shown until the engine has started, and Ctrl-C ends the process at once."""
    with leaving_at_once():
        from lmcache_rag.corpus import open_corpus

    with ExitStack() as stack:
        with err.status("Starting vLLM"), leaving_at_once():
            opened = stack.enter_context(open_corpus(folder, settings, **options))
        yield opened


def _check_nothing_of_an_engines(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value:
            option = "tier" if name == "tiers" else name
            raise PromptError(
                f"--{option}: a server has its own and tells nothing of it: leave it out, or start an engine, without "
                "--server (and LMCACHE_RAG_BASE_URL)."
            )


@contextmanager
def asked(server: str | None, folder: Path, settings: IndexSettings, **options: Any) -> Iterator[tuple[Engine, Corpus]]:
    """An index to be asked, by an engine that is started for it, or by a server where one is named.

    Raises:
        PromptError: a server is named, and something that only an engine of one's own can be told.
    """
    if server is not None:
        _check_nothing_of_an_engines({"model": settings.model, **options})
    if server is None:
        with started(folder, settings, **options) as opened:
            yield opened
        return
    with leaving_at_once():
        from lmcache_rag.corpus import open_remotely
    with open_remotely(folder, server) as remote:
        yield remote
