"""Writers that are to be killed, for `bench faults`: each works on a store until it is, and says what it has done.

This process imports what they need once, and forks one for each line that it reads: the task, and the number of the
first chunk. It prints the writer's process id, and `end` when the writer is dead. Neither loads torch: what is stored
are made-up objects in the form of real ones.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_rag.blobs.base import Store
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import KVScope, key_of
from lmcache_rag.codec.container import ObjectHeader, pack
from lmcache_rag.library.garbage import collect
from lmcache_rag.library.names import object_name
from lmcache_rag.library.rebuild import rebuild
from lmcache_rag.library.room import Limits, Room
from lmcache_rag.records import records as records_module
from lmcache_rag.records.part import VariantRow
from lmcache_rag.records.records import Records

SCOPE = KVScope("doomed", "0" * 32)
FORM = f"{'a' * 16}.q8"
LIMITS = Limits(capacity_bytes=128 << 10)
_SEGMENTS = 24
_LAYERS, _STREAM_BYTES = 2, 400


def tokens_of(number: int) -> np.ndarray:
    """A chunk's tokens, int32."""
    return np.random.default_rng(number).integers(0, 1 << 20, 24 + number % 40, dtype=np.int32)


def object_of(number: int) -> list[bytes | memoryview]:
    """A chunk's object, in parts; the same each time."""
    tokens, draw = tokens_of(number), np.random.default_rng([number, 1])
    variant, _, codec = FORM.partition(".")
    header = ObjectHeader(
        namespace=SCOPE.namespace, model=SCOPE.model, key=key_of(tokens).hex(), variant=variant, codec=codec,
        tokens=len(tokens), group=64, layers=_LAYERS, kv_heads=1, head_size=2, dtype="float32",
    )  # fmt: skip
    return pack(header, tokens, [[draw.bytes(_STREAM_BYTES + number % 200) for _ in range(_LAYERS)]])


def save(store: Store, room: Room, number: int) -> None:
    """What `ChunkStore.save` does, without a model."""
    tokens, parts = tokens_of(number), object_of(number)
    key = key_of(tokens)
    room.make(SCOPE, sum(map(len, parts)))
    size = store.write(object_name(SCOPE, key, FORM), parts)
    room.records(SCOPE).add({key: tokens}, [VariantRow(key, FORM, size, int(time.time()))])


class _TellingRecords(Records):
    """Says what it is going to forget."""

    def drop(self, objects: Any, *arguments: Any, **options: Any) -> list[VariantRow]:
        objects = list(objects)
        say("going", *(key.hex() for key, _ in objects))
        return super().drop(objects, *arguments, **options)


def say(*words: object) -> None:
    """One line, in one write."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def _ingest(store: Store, room: Room, first: int) -> None:
    for number in count(first):
        save(store, room, number)
        say("stored", number)


def _evict(store: Store, room: Room, first: int) -> None:
    for number in count(first):
        save(store, room, number)
        say("stored", number)
        room._evict(room.size_bytes * 3 // 4, only_incidental=False)
        say("evicted")


def _repeat(what: Callable[[Store, Room], Any]) -> Callable[[Store, Room, int], None]:
    def run(store: Store, room: Room, first: int) -> None:
        for number in count(first):
            save(store, room, number)
            say("stored", number)
            what(store, room)
            say("done")

    return run


TASKS: dict[str, Callable[[Store, Room, int], None]] = {
    "ingest": _ingest,
    "evict": _evict,
    "compact": _repeat(lambda _store, room: room.records(SCOPE).compact()),
    "rebuild": _repeat(lambda store, _room: rebuild(store, SCOPE)),
    "gc": _repeat(lambda store, _room: collect(store, Limits(), wait=lambda: None)),
}


def work(folder: Path, task: str, first: int) -> None:
    """Do a task until killed."""
    records_module._SEGMENTS = _SEGMENTS
    store = DiskStore(folder)
    room = Room(store, SCOPE.namespace, LIMITS)
    room._kept[SCOPE] = room._records[SCOPE] = _TellingRecords(store, SCOPE)
    TASKS[task](store, room, first)


def main(folder: Path) -> None:
    """Fork writers, one after another."""
    assert "torch" not in sys.modules
    for line in sys.stdin:
        task, first = line.split()
        child = os.fork()
        if not child:
            try:
                work(folder, task, int(first))
            except BaseException as error:  # noqa: BLE001  # whatever it is, the test is to hear of it
                say("failed", repr(error))
            os._exit(1)
        say("pid", child)
        os.waitpid(child, 0)
        say("end")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
