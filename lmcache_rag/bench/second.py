"""A second engine, in a process of its own: a process holds one at a time."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any, Self

from lmcache_rag.engine.base import Completion
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.settings import EngineSettings, Sampling
from lmcache_rag.errors import EngineError, LmcacheRagError
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions


class SecondEngine:
    """Answers one prompt at a time.

    Raises:
        LmcacheRagError: what a `LocalEngine` raises; also of `generate` and `settle`.
    """

    def __init__(self, settings: EngineSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, settings.model_dump()), daemon=True)
        self._process.start()
        there.close()
        self._received()

    def generate(
        self, prompt: MarkedPrompt, sampling: Sampling, options: BlendOptions | None, *, cache_salt: str | None
    ) -> Completion:
        """See `LocalEngine.generate`."""
        self._pipe.send(("generate", (prompt, sampling, options), {"cache_salt": cache_salt}))
        done: Completion = self._received()
        return done

    def settle(self) -> None:
        """See `LocalEngine.settle`."""
        self._pipe.send(("settle", (), {}))
        self._received()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def _received(self) -> Any:
        try:
            result = self._pipe.recv()
        except EOFError:
            raise EngineError("The second engine's process has ended.") from None
        if isinstance(result, LmcacheRagError):
            raise result
        return result


def _serve(pipe: Connection, settings: dict[str, Any]) -> None:
    try:
        engine = LocalEngine(EngineSettings(**settings))
    except LmcacheRagError as error:
        pipe.send(error)
        return
    with engine:
        pipe.send(None)
        while True:
            try:
                method, arguments, named = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(getattr(engine, method)(*arguments, **named))
            except LmcacheRagError as error:
                pipe.send(error)
