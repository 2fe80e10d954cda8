"""The stored object: a header, token ids, and groups of tokens one after another. All numbers are little-endian.

    offset   bytes  what
    0        8      magic "LMCRAGKV"
    8        4      format version
    12       4      N, the length of the JSON in the header
    16       4      P, the number of parts
    20       4      0
    24       8      XXH3-64 of the first 24 bytes and of the header
    32       N+16P  header: `ObjectHeader` in JSON, then for each part its length (8 bytes) and its XXH3-64 (8 bytes)
    ...             part 0: the token ids as int32
    ...             part i + 1: group i, the length of each layer's stream (4 bytes), then the streams as its codec
                    wrote them, each filled up with zeros to a multiple of 4 bytes

So some of a chunk's tokens are one range of bytes, which can be read and checked without the others. Every length is
checked against the bytes that are there before anything is allocated; every byte is under a checksum; nothing is
unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmcache_rag.chunk_kv import chunk_key, form_of
from lmcache_rag.errors import CorruptObjectError, StoreError

if TYPE_CHECKING:
    from lmcache_rag_kernels import CodedGroups

FORMAT_VERSION = 3
_MAGIC = b"LMCRAGKV"
_PREFIX = struct.Struct("<8sIIII")
_CHECKSUM = struct.Struct("<Q")
_HEADER_AT = _PREFIX.size + _CHECKSUM.size
_PART = np.dtype([("length", "<u8"), ("xxh3", "<u8")])
_ALIGN = 4
_MAX_JSON = 1 << 16
_MAX_PARTS = (1 << 18) + 1
_MAX_PART = 1 << 40
_MAX_STREAM = (1 << 32) - 1


class BaseObject(BaseModel):
    """What a residual is to be added to.

    Attributes:
        form: of the same chunk.
        checksum: the one that the object in this form begins with. Computed again, the form may be another object.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: str
    checksum: int = Field(ge=0, lt=1 << 64)


class ObjectHeader(BaseModel):
    """What an object says of itself.

    Attributes:
        codec: the name of the one that it was written in.
        base: of a residual.
        tables: digest of the tables that the codec needs; empty where it needs none.
        group: so many tokens are a group; the last one may have fewer.
        dtype: a torch dtype's name, without `torch.`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespace: str
    model: str
    key: str
    variant: str
    codec: str
    base: BaseObject | None = None
    tables: str = ""
    tokens: int = Field(ge=1, lt=1 << 24)
    group: int = Field(ge=1, le=1 << 24)
    layers: int = Field(ge=1, lt=1 << 12)
    kv_heads: int = Field(ge=1, lt=1 << 12)
    head_size: int = Field(ge=1, lt=1 << 12)
    dtype: str

    @property
    def name(self) -> str:
        """Where the object belongs in a store."""
        folder = f"{self.namespace}/{self.model}/{self.key[:2]}/{self.key}"
        form = form_of(self.variant, self.codec, self.base.form if self.base is not None else "")
        return f"{folder}/{form}.v{FORMAT_VERSION}"

    @property
    def groups(self) -> int:
        return -(-self.tokens // self.group)


@dataclass(frozen=True)
class ObjectIndex:
    """What an object's first bytes say: what it is, and where its groups lie.

    Attributes:
        starts: int64 `[groups + 1]`: where each group begins in the object; behind the last the object's length.
        checksums: XXH3-64 of each group.
        checksum: of the header, and so of all of the object.
    """

    header: ObjectHeader
    token_ids: np.ndarray
    starts: np.ndarray
    checksums: tuple[int, ...]
    checksum: int

    @property
    def size(self) -> int:
        """The whole object's length in bytes."""
        return int(self.starts[-1])

    def groups_of(self, offset: int, length: int) -> range:
        """The groups that hold so many tokens, one at least, from `offset` on. Raises `ValueError` where there are no
        such tokens."""
        if offset < 0 or length < 1 or offset + length > self.header.tokens:
            raise ValueError(f"tokens {offset} to {offset + length} of a chunk of {self.header.tokens}")
        return range(offset // self.header.group, (offset + length - 1) // self.header.group + 1)

    def range_of(self, offset: int, length: int) -> tuple[int, int]:
        """Which bytes of the object, from the first to the end, those groups are. Raises `ValueError`."""
        groups = self.groups_of(offset, length)
        return int(self.starts[groups.start]), int(self.starts[groups.stop])


@dataclass(frozen=True)
class StoredObject:
    """An unpacked object whose checksums were right, or some of its groups: views of the bytes that it was unpacked
    from."""

    header: ObjectHeader
    token_ids: np.ndarray
    coded: CodedGroups
    checksum: int


def pack(
    header: ObjectHeader, token_ids: np.ndarray, groups: Sequence[Sequence[bytes | memoryview]]
) -> list[bytes | memoryview]:
    """The parts of an object, to be written one after another.

    Args:
        groups: the streams of each group's layers.
    """
    parts: list[list[bytes | memoryview]] = [[token_ids.astype("<i4").tobytes()], *map(_packed_group, groups)]
    written = np.array([(sum(map(len, part)), _digest(part)) for part in parts], dtype=_PART)
    json = header.model_dump_json(exclude_none=True).encode()
    json += b" " * (-len(json) % _ALIGN)
    if len(json) > _MAX_JSON or len(parts) > _MAX_PARTS:
        raise StoreError(
            "A chunk's names or its tokens are too many to be stored: split the documents into smaller ones."
        )
    text = json + written.tobytes()
    prefix = _PREFIX.pack(_MAGIC, FORMAT_VERSION, len(json), len(parts), 0)
    checksum = _CHECKSUM.pack(_digest([prefix, text]))
    return [prefix + checksum + text, *(piece for part in parts for piece in part)]


def open_index(start: memoryview) -> ObjectIndex | int:
    """An object's index from its first bytes, or how many bytes are needed where `start` holds too few.

    Raises:
        CorruptObjectError: it is of another version, or not what its checksums say.
    """
    if len(start) < _HEADER_AT:
        return _HEADER_AT
    magic, version, json, count, zero = _PREFIX.unpack_from(start)
    if magic != _MAGIC:
        raise CorruptObjectError("not a stored KV object")
    if version != FORMAT_VERSION:
        raise CorruptObjectError(f"format version {version}, this release reads {FORMAT_VERSION}")
    if json > _MAX_JSON or not 0 < count <= _MAX_PARTS or zero:
        raise CorruptObjectError("its header is impossibly long")
    end = _HEADER_AT + json + _PART.itemsize * count
    if len(start) < end:
        return end
    text = bytes(start[_HEADER_AT:end])
    checksum = _digest([start[: _PREFIX.size], text])
    if (checksum,) != _CHECKSUM.unpack_from(start, _PREFIX.size):
        raise CorruptObjectError("its header has a wrong checksum")
    header, parts = _read_header(text[:json], np.frombuffer(text, _PART, offset=json))
    token_ids = start[end : end + 4 * header.tokens]
    if len(token_ids) < 4 * header.tokens:
        return end + 4 * header.tokens
    if _digest([token_ids]) != parts["xxh3"][0]:
        raise CorruptObjectError("the token ids have a wrong checksum")
    starts = end + np.cumsum(parts["length"].astype(np.int64))
    return ObjectIndex(header, _token_ids(header, token_ids), starts, tuple(parts["xxh3"][1:].tolist()), checksum)


def unpack(data: memoryview) -> StoredObject:
    """Check and open an object.

    Raises:
        CorruptObjectError: it is cut short, of another version, or not what its checksums say.
    """
    index = open_index(data)
    if isinstance(index, int):
        raise CorruptObjectError("cut short in its first bytes")
    if index.size != len(data):
        raise CorruptObjectError("cut short" if index.size > len(data) else "longer than it says")
    return unpack_range(index, 0, index.header.tokens, data[int(index.starts[0]) :])


def check(data: memoryview) -> ObjectIndex:
    """Check all of an object without opening it, which takes torch. Raises `CorruptObjectError`."""
    index = open_index(data)
    if isinstance(index, int) or index.size != len(data):
        raise CorruptObjectError("cut short, or longer than it says")
    _places(index, range(index.header.groups), data[int(index.starts[0]) :])
    return index


def unpack_range(index: ObjectIndex, offset: int, length: int, data: memoryview) -> StoredObject:
    """Check and open those groups of an object that hold so many tokens from `offset` on.

    Args:
        data: the bytes `index.range_of(offset, length)` of the object.

    Raises:
        CorruptObjectError: the bytes are fewer or more, or not what their checksums say.
        ValueError: there are no such tokens.
    """
    from lmcache_rag_kernels import CodedGroups  # with torch, which whoever only looks into an object does without

    groups = index.groups_of(offset, length)
    coded = CodedGroups(data, _places(index, groups, data), index.header.tokens, index.header.group, groups.start)
    return StoredObject(index.header, index.token_ids, coded, index.checksum)


def _places(index: ObjectIndex, groups: range, data: memoryview) -> np.ndarray:
    """Where each layer's stream begins in some groups' bytes, and how long it is: int64 `[groups, layers, 2]`. Raises
    `CorruptObjectError`."""
    layers = index.header.layers
    starts = index.starts[groups.start : groups.stop + 1] - index.starts[groups.start]
    if len(data) != starts[-1]:
        raise CorruptObjectError(f"cut short, or longer than it says, in groups {groups.start} to {groups.stop - 1}")
    places = np.empty((len(groups), layers, 2), np.int64)
    for group, begin, end, own in zip(groups, starts[:-1].tolist(), starts[1:].tolist(), places, strict=True):
        if _digest([data[begin:end]]) != index.checksums[group]:
            raise CorruptObjectError(f"group {group} has a wrong checksum")
        lengths = np.frombuffer(data[begin:end], "<u4", layers).astype(np.int64)
        ends = begin + 4 * layers + np.cumsum(lengths + -lengths % _ALIGN)
        if ends[-1] != end:
            raise CorruptObjectError(f"group {group} contradicts itself")
        own[:, 0] = ends - (lengths + -lengths % _ALIGN)
        own[:, 1] = lengths
    return places


def _packed_group(streams: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    if max(map(len, streams)) > _MAX_STREAM:
        raise StoreError("A layer's KV is longer than 4 GiB: split the documents into smaller chunks.")
    packed: list[bytes | memoryview] = [np.array([len(stream) for stream in streams], "<u4").tobytes()]
    for stream in streams:
        packed.append(stream)
        if len(stream) % _ALIGN:
            packed.append(bytes(-len(stream) % _ALIGN))
    return packed


def _read_header(json: bytes, parts: np.ndarray) -> tuple[ObjectHeader, np.ndarray]:
    """The header, and the parts as far as they can be."""
    try:
        header = ObjectHeader.model_validate_json(json)
    except ValidationError as error:
        raise CorruptObjectError("its header cannot be read") from error
    lengths = parts["length"]
    fits = (
        len(parts) == header.groups + 1
        and lengths[0] == 4 * header.tokens
        and bool((lengths <= _MAX_PART).all())
        and bool((lengths[1:] >= 4 * header.layers).all())
        and not (lengths % _ALIGN).any()
    )
    if not fits:
        raise CorruptObjectError("its header contradicts itself")
    return header, parts


def _digest(pieces: Sequence[bytes | memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return int(digest.intdigest())


def _token_ids(header: ObjectHeader, content: memoryview) -> np.ndarray:
    token_ids = np.frombuffer(content, dtype="<i4")
    if chunk_key(token_ids) != header.key:
        raise CorruptObjectError("its token ids are not those of its key")
    return token_ids
