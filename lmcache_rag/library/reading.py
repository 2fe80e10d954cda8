"""Reading stored objects, or parts of them, from a store."""

from __future__ import annotations

from lmcache_rag.blobs.base import Store
from lmcache_rag.codec import ObjectIndex, StoredObject, open_index, unpack, unpack_range
from lmcache_rag.errors import CorruptObjectError, StoreError

_FIRST_BYTES = 32 << 10
"""The index of most objects is in these."""


def read_index(store: Store, name: str) -> tuple[ObjectIndex, int] | None:
    """What an object is and where its groups lie, and how many bytes were read for that; None where it is absent.

    Raises:
        CorruptObjectError: it is damaged.
        StoreError: the store cannot be read.
    """
    needed = _FIRST_BYTES
    while True:
        start = store.read(name, 0, needed)
        if start is None:
            return None
        index = open_index(start)
        if not isinstance(index, int):
            return index, len(start)
        if index <= needed:
            raise CorruptObjectError("cut short in its first bytes")
        needed = index


def read_object(store: Store, name: str, part: range | None) -> tuple[StoredObject, int] | None:
    """An object, or those of its groups that hold some of its tokens, and how many bytes were read.

    Raises:
        CorruptObjectError: what was read is damaged.
        ValueError: the chunk has no such tokens.
        StoreError: the store cannot be read.
    """
    if part is None:
        data = store.read(name)
        return None if data is None else (unpack(data), len(data))
    found = read_index(store, name)
    if found is None:
        return None
    index, length = found
    begin, end = index.range_of(part.start, len(part))
    data = store.read(name, begin, end - begin)
    if data is None:
        return None
    return unpack_range(index, part.start, len(part), data), length + len(data)


def read_if_usable(store: Store, name: str, part: range | None) -> tuple[StoredObject, int] | str:
    """As `read_object`, or why that is not possible."""
    try:
        read = read_object(store, name, part)
    except CorruptObjectError:
        return "corrupt"
    except StoreError:
        return "unreadable"
    except ValueError:
        return "shorter than planned"
    return "absent" if read is None else read
