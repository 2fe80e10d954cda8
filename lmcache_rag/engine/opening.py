"""The engine that an application names: one that runs, one to start here, or servers."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_rag.engine.base import Engine
from lmcache_rag.engine.settings import EngineSettings
from lmcache_rag.errors import EngineError


def engine_of(
    engine: Engine | None = None,
    settings: EngineSettings | None = None,
    base_url: str | Sequence[str] | None = None,
) -> Engine:
    """The engine given, one started from the settings given, or a client of the servers at `base_url`.

    Raises:
        EngineError: not exactly one of them is given, or the engine does not start.
    """
    if sum(each is not None for each in (engine, settings, base_url)) != 1:
        raise EngineError(
            "Give one of engine= (a running engine), settings= (EngineSettings to start one from) and base_url= "
            "(of servers)."
        )
    if engine is not None:
        return engine
    if settings is not None:
        from lmcache_rag.engine.local import LocalEngine

        return LocalEngine(settings)
    from lmcache_rag.engine.remote import RemoteEngine

    assert base_url is not None
    return RemoteEngine(base_url)
