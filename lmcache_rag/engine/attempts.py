"""A request's attempts at several servers, until one answers or patience is over."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lmcache_rag.engine.calls import Answer
from lmcache_rag.engine.servers import Server, Servers
from lmcache_rag.errors import EngineError, LmcacheRagError, PromptError, StoreError
from lmcache_rag.request import STORE_FAILED

_OVERLOADED = 429
_SERVER_ERRORS = 500
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND = 401, 403, 404


class NotFoundError(EngineError):
    """A server lacks what every one of ours has."""


class Attempts:
    """Of one request.

    Args:
        text: of the prompt; see `Servers`.
        patience_s: for how long it is tried again.

    Attributes:
        done: whether a server has answered.
    """

    def __init__(
        self, servers: Servers, text: str, patience_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._servers = servers
        self._text = text
        self._clock = clock
        self._until = clock() + patience_s
        self._last: Exception | None = None
        self.done = False

    def next(self) -> Server | float:
        """The server to ask, or for how many seconds to wait before asking for one.

        Raises:
            EngineError: none has answered, and patience is over.
        """
        if self._last is not None and self._clock() >= self._until:
            urls = ", ".join(server.url for server in self._servers.all)
            raise EngineError(
                f"No server answers at {urls} ({self._last}): is it running (`lmcache-rag serve`)?"
            ) from self._last
        found = self._servers.take(self._text)
        if isinstance(found, Server):
            return found
        if self._last is None:
            self._last = EngineError("it failed a moment ago")
        return min(found, max(0.0, self._until - self._clock()))

    @contextmanager
    def at(self, server: Server, answer: Answer | None = None) -> Iterator[None]:
        """Asking a server: what ends early by its fault is to be tried again, and is no exception.

        Raises:
            EngineError: it failed after a part of the answer was handed on, or refused the client.
            PromptError: it refused the request.
            StoreError: its store failed.
        """
        try:
            yield
        except Exception as error:
            refusal = _refusal(error, server.url, is_answer=answer is not None)
            if refusal is not None:
                self._servers.left(server)
                raise refusal from error
            if not _is_failure(error):
                self._servers.left(server)
                raise
            self._servers.failed(server)
            self._last = error
            if answer is not None and answer.begun:
                raise EngineError(f"The server {server.url} failed in the middle of an answer ({error}).") from error
        except BaseException:  # the caller has left, or was interrupted
            self._servers.left(server)
            raise
        else:
            self.done = True
            self._servers.answered(server, self._text)


def _refusal(error: Exception, url: str, *, is_answer: bool) -> LmcacheRagError | None:
    """What a server's answer that is no failure of its own is to the caller.

    Args:
        is_answer: whether it was asked to answer a prompt, and not for what every server of ours knows.
    """
    status = getattr(error, "status_code", None)
    if status is None or status == _OVERLOADED or status >= _SERVER_ERRORS:
        return None
    body: Any = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    if status == STORE_FAILED:
        return StoreError(f"The server's store failed: {said or error}")
    if status == _UNAUTHORIZED:
        return EngineError(f"The server {url} asks for a key: set LMCACHE_RAG_API_KEY, or api_key ({said or error}).")
    if status == _FORBIDDEN:
        return EngineError(f"The server refused: {said or error}")
    if status == _NOT_FOUND and not is_answer:
        return NotFoundError(
            f"The server {url} lacks what it was asked for ({said or error}): is it `lmcache-rag serve`, and the "
            "address right?"
        )
    return PromptError(f"The server refused the request: {said or error}")


def _is_failure(error: Exception) -> bool:
    """Whether it is the server's or the network's."""
    from openai import DefaultHttpxClient, OpenAIError

    # The client library underneath has two names, by OpenAI's release; its errors come through while a stream is read.
    transport = sys.modules[DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
    return isinstance(error, OpenAIError | ConnectionError | transport.TransportError)
