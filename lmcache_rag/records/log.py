"""The log of a store's records: immutable numbered blobs, written where they are absent and followed by asking for the
next number, so that it works on a disk and on object storage alike.

    <prefix><epoch>/base        the parts that say all that was known when the epoch began
    <prefix><epoch>/<number>    a segment, 1, 2, 3, ... without gaps; an empty one ends the epoch
    <prefix>parts/<epoch>.<id>  parts, large ones, that bases name
    <prefix>latest              which epoch to begin at: a hint, the only blob that changes

An epoch is ended by whoever merges its segments into parts; the next one begins with its base. Only the last two epochs
are kept.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import suppress

import xxhash

from lmcache_rag.blobs.base import Store
from lmcache_rag.errors import CorruptObjectError

Blob = Sequence[bytes | memoryview]

_KEPT_EPOCHS = 2
_LATEST = "latest"
_MOST_DIGITS = 19


class Log:
    """Names, reads and writes what is in the log; knows nothing of what it says.

    Args:
        prefix: of all its names, ends with `/`.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def epochs(self) -> list[int]:
        """The epochs that there are, ascending."""
        return sorted(int(name) for name in self._store.folders(self._prefix) if name.isdigit())

    def latest(self) -> int | None:
        """The epoch that the hint names, which may be an older one, or gone; None where there is no hint."""
        data = self._store.read(f"{self._prefix}{_LATEST}")
        text = b"" if data is None else bytes(data)
        return int(text) if 0 < len(text) < _MOST_DIGITS and text.isdigit() else None

    def point(self, epoch: int) -> None:
        """Have the hint name an epoch, which has begun."""
        self._store.write(f"{self._prefix}{_LATEST}", [str(epoch).encode()])

    def holds(self, epoch: int, number: int) -> bool:
        """Whether an epoch is still there, from one of its segments, or 0 for its base; the first epoch has no base."""
        return self._store.exists(self._name(epoch, f"{number:08}" if number else "base"))

    def end(self, epoch: int) -> None:
        """Write the segment that ends an epoch, behind all that it has."""
        number = 1
        while not self.write_segment(epoch, number, [b""]):
            content = self.segment(epoch, number)
            if content is not None and not len(content):
                return
            number += 1

    def base(self, epoch: int) -> list[str] | None:
        """The names of the parts that an epoch begins with; None where it has no base. Raises `CorruptObjectError`."""
        data = self._store.read(self._name(epoch, "base"))
        if data is None:
            return None
        checksum, _, text = bytes(data).partition(b"\n")
        if checksum != _checksum(text):
            raise CorruptObjectError("the base of an epoch of the records has a wrong checksum")
        return [str(name) for name in json.loads(text)["parts"]]

    def begin(self, epoch: int, parts: Sequence[str], *, replace: bool = False) -> bool:
        """Write an epoch's base; False where another writer was faster."""
        text = json.dumps({"parts": list(parts)}).encode()
        name, content = self._name(epoch, "base"), [_checksum(text) + b"\n" + text]
        if replace:
            self._store.write(name, content)
            return True
        return self._store.write_if_absent(name, content)

    def segment(self, epoch: int, number: int) -> memoryview | None:
        """A segment's bytes, none where it ends the epoch; None where it is not written yet."""
        return self._store.read(self._name(epoch, f"{number:08}"))

    def write_segment(self, epoch: int, number: int, content: Blob) -> bool:
        """Write a segment; False where another writer was faster."""
        return self._store.write_if_absent(self._name(epoch, f"{number:08}"), content)

    def write_part(self, epoch: int, content: Blob) -> str:
        """Write a part for the base of the epoch behind this one; returns its name."""
        name = f"{epoch:06}.{uuid.uuid4().hex}"
        self._store.write(f"{self._prefix}parts/{name}", content)
        return name

    def map_part(self, name: str) -> memoryview | None:
        """A part's bytes; None where it is gone."""
        return self._store.map(f"{self._prefix}parts/{name}")

    def healed_part(self, name: str) -> memoryview | None:
        """The bytes of a part that was read damaged, from behind all caches; None where there are none."""
        origin = self._store.heal(f"{self._prefix}parts/{name}")
        return None if origin is None else origin.map(f"{self._prefix}parts/{name}")

    def forget(self, epoch: int) -> None:
        """Delete what no epoch but those long before this one needs."""
        kept: set[str] = set()
        for number in self.epochs():
            if number > epoch - _KEPT_EPOCHS:
                with suppress(CorruptObjectError):  # which nobody can begin at
                    kept.update(self.base(number) or ())
            else:
                names = [self._name(number, name) for name in self._store.folders(f"{self._prefix}{number:06}/")]
                last = max((name for name in names if name[-1].isdigit()), default="")
                # What ends it goes last: whoever finds room for a segment there then finds nothing before it either.
                self._store.delete(name for name in names if name != last)
                self._store.delete([last] if last else [])
        unused = [
            f"{self._prefix}parts/{name}"
            for name in self._store.folders(f"{self._prefix}parts/")
            if name not in kept and int(name.partition(".")[0]) <= epoch - _KEPT_EPOCHS
        ]
        self._store.delete(unused)

    def _name(self, epoch: int, name: str) -> str:
        return f"{self._prefix}{epoch:06}/{name}"


def _checksum(text: bytes) -> bytes:
    return f"{xxhash.xxh3_64_intdigest(text):016x}".encode()
