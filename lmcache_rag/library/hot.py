"""What is read again and again stays in memory, decoded: loading it is a copy to its place."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from lmcache_rag.again import SeenOnce
from lmcache_rag.chunk_kv import ChunkKV, KVShape
from lmcache_rag.errors import CorruptObjectError
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.names import parsed

if TYPE_CHECKING:
    from lmcache_rag_kernels import Rows

DEFAULT_HOT_BYTES = 512 << 20

_REMEMBERED = 4096
"""So many objects that were read once are remembered, to be kept when they are read again."""


class HeldKV:
    """One stored variant of a chunk, as `LoadedKV`, in memory already.

    Attributes:
        codec: the name of the one that it was stored in.
        size_bytes: read from the store for it, if anything was.
    """

    def __init__(self, chunk: ChunkKV, codec: str, size_bytes: int = 0) -> None:
        self._chunk = chunk
        self.codec = codec
        self.size_bytes = size_bytes

    @property
    def tokens(self) -> int:
        return self._chunk.tokens

    @property
    def token_ids(self) -> np.ndarray:
        """All of the chunk's, int32."""
        return self._chunk.token_ids

    @property
    def held_bytes(self) -> int:
        """Of memory."""
        return self._chunk.kv.nbytes

    def place(self, offset: int, rows: Rows) -> None:
        """See `ChunkKV.place`."""
        self._chunk.place(offset, rows)


class HotChunks:
    """Chunks in a store, of which those that were read at least twice are kept in memory, those used last. What is kept
    is as immutable as what is stored: its name says which tokens, behind what and in which codec.

    Args:
        capacity_bytes: of all that is kept, decoded.
        pinned: whether a GPU copies from it, for which it lies in pinned memory.
    """

    def __init__(self, chunks: ChunkStores, capacity_bytes: int, *, pinned: bool = False) -> None:
        self._chunks = chunks
        self._capacity_bytes = capacity_bytes
        self._pinned = pinned
        self._held: OrderedDict[str, HeldKV] = OrderedDict()
        self._bytes = 0
        self._read_once = SeenOnce(_REMEMBERED)
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Of all that is kept."""
        return self._bytes

    def holds(self, name: str) -> bool:
        """Whether an object is in memory."""
        return name in self._held

    def load(self, name: str, shape: KVShape, part: range | None = None) -> LoadedKV | HeldKV | str:
        """See `ChunkStore.load`."""
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                self._held.move_to_end(name)
        if held is not None:
            self._chunks.of(name.partition("/")[0]).uses.note(*parsed(name)[:2])
            return held
        found = self._chunks.load(name, shape, part)
        if isinstance(found, str) or part is not None or not self._is_read_again(name):
            return found
        held_bytes = shape.bytes_per_token * found.tokens
        if held_bytes > self._capacity_bytes:
            return found
        try:
            kv = found.kv()
            chunk = ChunkKV(found.token_ids.copy(), kv.pin_memory() if self._pinned else kv)
        except (CorruptObjectError, RuntimeError):  # which the one says again where it is placed; the other: no memory
            return found
        self._keep(name, HeldKV(chunk, found.codec))
        return HeldKV(chunk, found.codec, found.size_bytes)

    def _is_read_again(self, name: str) -> bool:
        with self._lock:
            return self._read_once.again(name)

    def _keep(self, name: str, held: HeldKV) -> None:
        with self._lock:
            if name in self._held:
                return
            while self._held and self._bytes + held.held_bytes > self._capacity_bytes:
                self._bytes -= self._held.popitem(last=False)[1].held_bytes
            self._held[name] = held
            self._bytes += held.held_bytes
