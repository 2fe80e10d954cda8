"""A model's codec tables in a store, and the codecs made from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from lmcache_rag.blobs.base import Store
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import KVShape
from lmcache_rag.codec.base import Codec
from lmcache_rag.codec.registry import CODECS
from lmcache_rag.codec.tables import CodecTables
from lmcache_rag.errors import CorruptObjectError, StoreError
from lmcache_rag.model import cache_folder

_log = logging.getLogger(__name__)

_FOLDER = ".tables"
"""No namespace's name begins with a dot."""


class TableStore:
    """The tables of one model in a store: `.tables/<model>/<number>.<digest>`. What was coded with older ones stays
    readable; the last ones are for what is coded from now on."""

    def __init__(self, store: Store, model: str) -> None:
        self._store = store
        self._prefix = f"{_FOLDER}/{model}/"

    def add(self, tables: CodecTables) -> None:
        """Keep tables, from now on the last ones. Raises `StoreError`."""
        last, names = self.last(), self._names()
        if last is not None and last.digest == tables.digest:
            return
        number = int(names[-1].rpartition("/")[2].partition(".")[0]) + 1 if names else 1
        self._store.write(f"{self._prefix}{number:06}.{tables.digest}", [tables.to_bytes()])

    def last(self) -> CodecTables | None:
        """The tables to code with; damaged ones are passed over. Raises `StoreError`."""
        return self._first_readable(reversed(self._names()))

    def named(self, digest: str) -> CodecTables | None:
        """The tables of this digest; None where they are missing or damaged. Raises `StoreError`."""
        return self._first_readable(name for name in self._names() if name.endswith(f".{digest}"))

    def _names(self) -> list[str]:
        names = self._store.list(self._prefix)
        return sorted(name for name in names if name.rpartition("/")[2].partition(".")[0].isdigit())

    def _first_readable(self, names: Iterable[str]) -> CodecTables | None:
        for name in names:
            try:
                try:
                    tables = _tables(self._store, name)
                except CorruptObjectError:
                    origin = self._store.heal(name)
                    if origin is None:
                        raise
                    tables = _tables(origin, name)
            except CorruptObjectError as error:
                _log.warning("%s is passed over (%s)", name, error)
                continue
            if name.endswith(f".{tables.digest}"):
                return tables
        return None


def _tables(store: Store, name: str) -> CodecTables:
    return CodecTables.from_bytes(bytes(store.read(name) or b""))


def machine_store() -> Store | None:
    """Where this machine keeps the tables that it learned, whichever store they are used with; None where it cannot."""
    try:
        return DiskStore(cache_folder() / "codec")
    except StoreError as error:
        _log.warning("codec tables are not kept on this machine (%s)", error)
        return None


class ModelCodecs:
    """The codecs of one model, made once and used by several threads, none of which waits for another.

    Args:
        own: this machine's; tables that the store lacks are copied from there.
        shipped: finds those that come with the package, for a model of which neither has any.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        shape: KVShape,
        own: Store | None = None,
        shipped: Callable[[], CodecTables | None] = lambda: None,
    ) -> None:
        self._tables = TableStore(store, model)
        self._own = TableStore(own, model) if own is not None else None
        self._shipped = shipped
        self._shape = shape
        self._made: dict[tuple[str, str, bool], Codec] = {}
        self._known: dict[str, CodecTables] = {}
        self._last = ""

    def for_writing(self, name: str, *, residual: bool = False) -> tuple[Codec, str]:
        """The codec of this name, and the digest of its tables.

        Args:
            residual: of what is added to KV in this codec.

        Raises:
            StoreError: it needs tables, and there are none.
        """
        digest = ""
        if CODECS[name].learned:
            self._last = self._last or self._find_last()
            digest = self._last
        return self._codec(name, digest, residual=residual), digest

    def for_reading(self, name: str, digest: str, *, residual: bool = False) -> Codec | None:
        """The codec of an object; None where its tables are missing. Raises `StoreError`."""
        if CODECS[name].learned and digest not in self._known:
            tables = self._tables.named(digest)
            if tables is None and self._own is not None:
                tables = self._copied(self._own.named(digest))
            if tables is None:
                return None
            self._keep(tables)
        return self._codec(name, digest, residual=residual)

    def _find_last(self) -> str:
        tables = self._tables.last()
        if tables is None and self._own is not None:
            tables = self._copied(self._own.last())
        if tables is None:
            tables = self._copied(self._shipped())
        if tables is None:
            raise StoreError(
                "This model's KV codec has no tables yet: run `lmcache-rag calibrate` with the same --model and "
                "--dtype on this machine, or choose a codec without (raw, q8, q4)."
            )
        self._keep(tables)
        return tables.digest

    def _copied(self, tables: CodecTables | None) -> CodecTables | None:
        if tables is not None:
            try:
                self._tables.add(tables)
            except StoreError as error:  # a store that may only be read; these are as good
                _log.info("codec tables are not copied into the store (%s)", error)
        return tables

    def _keep(self, tables: CodecTables) -> None:
        layers, _, width = tables.mean.shape
        if (layers, width) != (self._shape.layers, self._shape.kv_heads * self._shape.head_size):
            raise CorruptObjectError("The codec tables stored for this model are those of another shape.")
        self._known[tables.digest] = tables

    def _codec(self, name: str, digest: str, *, residual: bool) -> Codec:
        key = (name, digest, residual)
        if key not in self._made:
            make = CODECS[name].residual if residual else CODECS[name].make
            assert make is not None
            self._made.setdefault(key, make(self._shape.layers, self._known.get(digest)))
        return self._made[key]
