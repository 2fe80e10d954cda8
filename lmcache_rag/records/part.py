"""What is known of some chunks, as immutable arrays that are searched where they lie: in memory, or mapped from a file.

A segment of the log is a small part, and an epoch begins with a few large ones. Parts are merged like the runs of a
log-structured merge tree (O'Neil et al. 1996): what a newer part says of a chunk holds before what an older one says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import xxhash

from lmcache_rag.errors import CorruptObjectError, StoreError
from lmcache_rag.records.fingerprints import gram_hashes, winnow

_MAGIC = b"LMCRAGRC"
_VERSION = 1
_ALIGN = 64
_MAX_HEADER = 64 << 20

KEY_BYTES = 16


@dataclass(frozen=True)
class VariantRow:
    """A stored object of a chunk.

    Attributes:
        form: its variant and codec as in the object's name.
        size_bytes: 0 says that it is gone.
        used_s: when it was last used, or stored, in seconds since 1970; 0 where that is not known. A use is recorded
            by the same row with a later time.
    """

    key: bytes
    form: str
    size_bytes: int
    used_s: int


@dataclass(frozen=True)
class OwnerRow:
    """Whether an owner, named by a number, holds a chunk."""

    key: bytes
    owner: int
    held: bool


@dataclass(frozen=True)
class Part:
    """Chunks 0 to n - 1, ascending by key.

    Attributes:
        forms: what `variant_form` counts in.
        key_high, key_low: uint64 `[n]`: a key's first and last eight bytes, as big-endian numbers.
        token_at: uint64 `[n + 1]`: where each chunk's tokens begin in `tokens`; a part that only adds to what older
            ones know of a chunk has none of them.
        tokens: int32.
        gram, gram_chunk, gram_at: uint64 and uint32 `[fingerprints]`: hash, ascending, of the run of tokens at
            `gram_at` of chunk `gram_chunk`.
        variant_at: uint32 `[n + 1]`; variant_form, variant_size, variant_used: uint32, uint64 and uint32.
        owner_at: uint32 `[n + 1]`; owner, owner_held: uint64 and uint8.
    """

    key_high: np.ndarray
    key_low: np.ndarray
    token_at: np.ndarray
    tokens: np.ndarray
    gram: np.ndarray
    gram_chunk: np.ndarray
    gram_at: np.ndarray
    variant_at: np.ndarray
    variant_form: np.ndarray
    variant_size: np.ndarray
    variant_used: np.ndarray
    owner_at: np.ndarray
    owner: np.ndarray
    owner_held: np.ndarray
    forms: tuple[str, ...] = ()
    mapped: bool = field(default=False, compare=False)

    def __len__(self) -> int:
        return len(self.key_high)

    @property
    def size_bytes(self) -> int:
        """Of all arrays."""
        return sum(getattr(self, name).nbytes for name in _DTYPES)

    def row(self, key: bytes) -> int:
        """The chunk of this key; -1 where it is not here."""
        high, low = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
        row = int(self.key_high.searchsorted(np.uint64(high)))
        while row < len(self) and int(self.key_high[row]) == high:
            if int(self.key_low[row]) == low:
                return row
            row += 1
        return -1

    def key(self, row: int) -> bytes:
        """The key of a chunk."""
        return int(self.key_high[row]).to_bytes(8, "big") + int(self.key_low[row]).to_bytes(8, "big")

    def tokens_of(self, row: int) -> np.ndarray:
        """int32; empty where another part has them."""
        return self.tokens[int(self.token_at[row]) : int(self.token_at[row + 1])]

    def variants_of(self, row: int) -> list[VariantRow]:
        """What this part says of a chunk's stored objects."""
        key, rows = self.key(row), slice(int(self.variant_at[row]), int(self.variant_at[row + 1]))
        columns = (self.variant_form[rows], self.variant_size[rows], self.variant_used[rows])
        return [
            VariantRow(key, self.forms[form], size, at)
            for form, size, at in zip(*_lists(columns), strict=True)
            if form < len(self.forms)  # all are, but in a damaged part
        ]

    def owners_of(self, row: int) -> list[OwnerRow]:
        """What this part says of who holds a chunk."""
        key, rows = self.key(row), slice(int(self.owner_at[row]), int(self.owner_at[row + 1]))
        columns = (self.owner[rows], self.owner_held[rows])
        return [OwnerRow(key, owner, bool(held)) for owner, held in zip(*_lists(columns), strict=True)]

    def keys_of(self, owner: int) -> list[bytes]:
        """The chunks of which this part says something about this owner."""
        rows = np.searchsorted(self.owner_at, np.flatnonzero(self.owner == np.uint64(owner)), side="right") - 1
        return [self.key(row) for row in rows.tolist()]

    def to_bytes(self) -> list[bytes | memoryview]:
        """What `from_bytes` reads, in parts that are to be written one after another."""
        places: dict[str, int] = {}
        body: list[bytes | memoryview] = []
        checksum, at = xxhash.xxh3_64(), 0
        for name, dtype in _DTYPES.items():
            content = memoryview(np.ascontiguousarray(getattr(self, name), dtype).view(np.uint8).data)
            body += [content, bytes(-len(content) % _ALIGN)]
            for piece in body[-2:]:
                checksum.update(piece)
                at += len(piece)
            places[_stored_name(name)] = len(getattr(self, name))
        header = json.dumps({"arrays": places, "forms": self.forms, "body": at, "xxh3": checksum.intdigest()}).encode()
        prefix = _MAGIC + _VERSION.to_bytes(4, "little") + len(header).to_bytes(4, "little")
        prefix += xxhash.xxh3_64_intdigest(header).to_bytes(8, "little") + header
        return [prefix + bytes(-len(prefix) % _ALIGN), *body]

    @classmethod
    def from_bytes(cls, data: memoryview, *, mapped: bool = False) -> Part:
        """The arrays are views of `data`. The body's checksum is left alone where it is mapped, since reading all of it
        is what mapping is to avoid: what is found in it is compared with a prompt's tokens, and objects are checked.

        Raises:
            CorruptObjectError: it is not what `to_bytes` wrote.
            StoreError: a later release wrote it.
        """
        header, at = _read_header(data)
        body = data[at:]
        if len(body) != header["body"] or not (mapped or xxhash.xxh3_64_intdigest(body) == header["xxh3"]):
            raise CorruptObjectError("a part of the records that is cut short or has a wrong checksum")
        arrays, at = {}, 0
        for name, dtype in _DTYPES.items():
            length = int(header["arrays"][_stored_name(name)])
            if length < 0 or at + length * dtype.itemsize > len(body):
                raise CorruptObjectError("a part of the records that contradicts itself")
            arrays[name] = np.frombuffer(body, dtype, length, at) if length else np.zeros(0, dtype)
            at += length * dtype.itemsize
            at += -at % _ALIGN
        count = len(arrays["key_high"]) + 1
        if any(len(arrays[name]) != count for name in ("token_at", "variant_at", "owner_at")):
            raise CorruptObjectError("a part of the records that contradicts itself")
        forms = tuple(map(str, header["forms"]))
        if any("/" in form for form in forms):  # they are parts of names
            raise CorruptObjectError("a part of the records with a form that is none")
        return cls(**arrays, forms=forms, mapped=mapped)


def _read_header(data: memoryview) -> tuple[dict[str, Any], int]:
    """The header and where the body begins. Raises `CorruptObjectError`, or `StoreError` for one of a later release: it
    is whole, and to go on without it would be to lose what it says."""
    length = int.from_bytes(data[12:16], "little")
    if bytes(data[:8]) != _MAGIC or length > _MAX_HEADER:
        raise CorruptObjectError("no part of the records")
    version = int.from_bytes(data[8:12], "little")
    if version > _VERSION:
        raise StoreError(
            f"What is stored was recorded by a later release (version {version}, and this one reads {_VERSION}): "
            "use that release, or another folder with --store."
        )
    if version != _VERSION:
        raise CorruptObjectError(f"records of version {version}, and this release reads {_VERSION}")
    text = bytes(data[24 : 24 + length])
    if len(text) != length or xxhash.xxh3_64_intdigest(text) != int.from_bytes(data[16:24], "little"):
        raise CorruptObjectError("a part of the records whose header is cut short or has a wrong checksum")
    return json.loads(text), -(-(24 + length) // _ALIGN) * _ALIGN


def build(
    tokens: Mapping[bytes, np.ndarray], variants: Iterable[VariantRow] = (), owners: Iterable[OwnerRow] = ()
) -> Part:
    """A part from single facts; of two about the same, the later one holds.

    Args:
        tokens: by key, of chunks that are new.
    """
    last_variants = {(row.key, row.form): row for row in variants}
    last_owners = {(row.key, row.owner): row for row in owners}
    keys = sorted({*tokens, *(key for key, _ in last_variants), *(key for key, _ in last_owners)})
    rows = {key: row for row, key in enumerate(keys)}
    contents = [np.asarray(tokens.get(key, ()), dtype=np.int32) for key in keys]
    grams, chunks, places = _fingerprints(contents)
    forms = {form: number for number, form in enumerate(dict.fromkeys(form for _, form in last_variants))}
    listed = sorted(last_variants.values(), key=lambda row: rows[row.key])
    held = sorted(last_owners.values(), key=lambda row: rows[row.key])
    numbers = np.frombuffer(b"".join(keys), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return Part(
        key_high=numbers[:, 0].copy(),
        key_low=numbers[:, 1].copy(),
        token_at=_starts(np.array([len(content) for content in contents], np.int64), np.uint64),
        tokens=np.concatenate([*contents, np.zeros(0, np.int32)]),
        gram=grams,
        gram_chunk=chunks,
        gram_at=places,
        variant_at=_counted([rows[row.key] for row in listed], len(keys)),
        variant_form=np.array([forms[row.form] for row in listed], np.uint32),
        variant_size=np.array([row.size_bytes for row in listed], np.uint64),
        variant_used=np.array([row.used_s for row in listed], np.uint32),
        owner_at=_counted([rows[row.key] for row in held], len(keys)),
        owner=np.array([row.owner for row in held], np.uint64),
        owner_held=np.array([row.held for row in held], np.uint8),
        forms=tuple(forms),
    )


def _fingerprints(contents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grams, chunks, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)], [np.zeros(0, np.uint32)]
    for row, content in enumerate(contents):
        hashes = gram_hashes(content)
        kept = winnow(hashes)
        grams.append(hashes[kept])
        chunks.append(np.full(len(kept), row, np.uint32))
        places.append(kept.astype(np.uint32))
    gram = np.concatenate(grams)
    order = gram.argsort(kind="stable")
    return gram[order], np.concatenate(chunks)[order], np.concatenate(places)[order]


def _lists(columns: Iterable[np.ndarray]) -> list[list[int]]:
    return [column.tolist() for column in columns]


def _starts(counts: np.ndarray, dtype: Any) -> np.ndarray:
    """Where each of so many begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(dtype)


def _counted(rows: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    return _starts(np.bincount(np.asarray(rows, np.int64), minlength=count), np.uint32)


_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "key_high": "<u8",
        "key_low": "<u8",
        "token_at": "<u8",
        "tokens": "<i4",
        "gram": "<u8",
        "gram_chunk": "<u4",
        "gram_at": "<u4",
        "variant_at": "<u4",
        "variant_form": "<u4",
        "variant_size": "<u8",
        "variant_used": "<u4",
        "owner_at": "<u4",
        "owner": "<u8",
        "owner_held": "u1",
    }.items()
}
assert set(_DTYPES) == {item.name for item in fields(Part)} - {"forms", "mapped"}


def _stored_name(name: str) -> str:
    """What an array is called in a part's bytes, which are older than some names here."""
    return "variant_created" if name == "variant_used" else name
