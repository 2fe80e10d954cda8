"""Blobs as values of a Redis or Valkey server."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lmcache_rag.blobs.base import Untiered
from lmcache_rag.errors import StoreError

LARGEST_BYTES = 512 << 20
"""Redis takes no larger values."""

_AT_A_TIME = 1000

PASSWORD_VARIABLE = "LMCACHE_RAG_REDIS_PASSWORD"  # noqa: S105  # the name of one
USERNAME_VARIABLE = "LMCACHE_RAG_REDIS_USERNAME"

_TOLD = {
    "AuthenticationError": f"it asks for a password, or refuses this one: set {PASSWORD_VARIABLE} and, where the "
    f"server has users, {USERNAME_VARIABLE}",
    "AuthenticationWrongNumberOfArgsError": f"it has no users: unset {USERNAME_VARIABLE}",
    "OutOfMemoryError": "its memory is full: raise its maxmemory, or have it evict what was used longest ago "
    "(maxmemory-policy allkeys-lru) where it is a cache",
    "NoPermissionError": "access is denied: check what this user may do",
    "ReadOnlyError": "it is a read-only replica: name its primary",
}


class RedisStore(Untiered):
    """One value a blob, under `prefix` and its name. How durable a blob is says the server's own configuration, and one
    that evicts values has misses. A connection that breaks is made again by itself.

    Args:
        shown: what errors call it.
        silence_s: how long the server may take to answer.

    Raises:
        StoreError: the package `redis` is missing.
    """

    remote = True
    largest_bytes = LARGEST_BYTES

    def __init__(
        self,
        host: str,
        port: int = 6379,
        db: int = 0,
        *,
        prefix: str = "",
        tls: bool = False,
        shown: str = "Redis",
        silence_s: float = 5.0,
    ) -> None:
        try:
            import redis
            from redis.backoff import ExponentialBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise StoreError("Redis needs one more package: pip install 'lmcache-rag[redis]'.") from error
        self._prefix = prefix
        self._shown = shown
        self._client = redis.Redis(
            host=host,
            port=port,
            db=db,
            ssl=tls,
            username=os.environ.get(USERNAME_VARIABLE) or None,
            password=os.environ.get(PASSWORD_VARIABLE) or None,
            socket_timeout=silence_s,
            socket_connect_timeout=min(2.0, silence_s),
            # What took too long once is not tried again.
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 3, (redis.ConnectionError, ConnectionError)),
        )

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> int:
        content = self._content(name, parts)
        with self._asking(f"{name} could not be stored"):
            self._client.set(self._key(name), content)
        return len(content)

    def write_if_absent(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        content = self._content(name, parts)
        with self._asking(f"{name} could not be stored"):
            return bool(self._client.set(self._key(name), content, nx=True))

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        key = self._key(name)
        with self._asking(f"{name} could not be read"):
            if not start and length is None:
                content: Any = self._client.get(key)
            else:
                # An end of -1 is the value's own, and one before the start reads nothing.
                end = -1 if length is None else start + length - 1
                content = self._client.getrange(key, start, end) if length != 0 else b""
                if not content and not self._client.exists(key):
                    return None
        return None if content is None else memoryview(bytearray(content))

    def map(self, name: str) -> memoryview | None:
        return self.read(name)

    def exists(self, name: str) -> bool:
        with self._asking(f"{name} could not be looked up"):
            return bool(self._client.exists(self._key(name)))

    def size(self, name: str) -> int | None:
        key = self._key(name)
        with self._asking(f"{name} could not be looked up"):
            pipeline: Any = self._client.pipeline()
            there, length = pipeline.exists(key).strlen(key).execute()
        return int(length) if there else None

    def delete(self, names: Iterable[str]) -> None:
        keys = (self._key(name) for name in names)
        while some := list(itertools.islice(keys, _AT_A_TIME)):
            with self._asking(f"{len(some)} blobs could not be deleted"):
                self._client.unlink(*some)

    def list(self, prefix: str) -> Iterator[str]:
        seen: set[str] = set()
        for names in self._scanned(prefix):
            yield from sorted(names - seen)
            seen |= names

    def folders(self, prefix: str) -> Sequence[str]:
        return sorted({name[len(prefix) :].partition("/")[0] for name in self.list(prefix)})

    def free_bytes(self) -> int | None:
        return None

    def entries(self) -> Iterator[tuple[str, int, float]]:
        seen: set[str] = set()
        for names in self._scanned(""):
            new = sorted(names - seen)
            seen |= names
            with self._asking("its values could not be looked up"):
                lengths = self._client.pipeline(transaction=False)
                for name in new:
                    lengths.strlen(self._key(name))
                found = lengths.execute(raise_on_error=False)
                # What else there is may have no length.
                yield from ((name, size, 0.0) for name, size in zip(new, found, strict=True) if isinstance(size, int))

    def touch(self, name: str) -> None:
        """The server knows by itself."""

    def _scanned(self, prefix: str) -> Iterator[set[str]]:
        """Names below a prefix, some at a time, perhaps more than once. The server looks at all its keys for that."""
        pattern = re.sub(r"([*?\[\]\\^])", r"\\\1", self._prefix + prefix) + "*"
        cursor: Any = None
        keys: Any
        while cursor != 0:
            with self._asking(f"{prefix or 'its names'} could not be listed"):
                cursor, keys = self._client.scan(cursor or 0, match=pattern.encode(), count=_AT_A_TIME)
            names = (key.decode(errors="ignore") for key in keys)
            yield {name[len(self._prefix) :] for name, key in zip(names, keys, strict=True) if name.encode() == key}

    def _key(self, name: str) -> bytes:
        return f"{self._prefix}{name}".encode()

    def _content(self, name: str, parts: Sequence[bytes | memoryview]) -> bytes:
        length = sum(memoryview(part).nbytes for part in parts)
        if length > LARGEST_BYTES:
            raise StoreError(
                f"{name} has {length / 1e6:.0f} MB, and Redis takes {LARGEST_BYTES / 1e6:.0f} MB at most: keep what is "
                "so large in object storage, and Redis in front of it (--tier)."
            )
        return b"".join(parts)

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        import redis

        try:
            yield
        except (redis.RedisError, OSError) as error:
            told = _TOLD.get(type(error).__name__)
            reason = f"{error or type(error).__name__}".partition("\n")[0].rstrip(".")
            told = told or f"{reason}. Check that the server is there, and its address"
            raise StoreError(f"{what} in {self._shown}: {told}.") from None
