"""The stored object: a header, then one stream of bytes for the token ids and one per layer.

    offset  bytes  what
    0       8      magic "LMCRAGKV"
    8       4      format version, little-endian
    12      4      header length N, little-endian
    16      8      XXH3-64 of the header, little-endian
    24      N      header: JSON, `ObjectHeader`
    ...            streams, each starting at a multiple of 64 bytes; stream 0 is the token ids as little-endian
                   int32, stream i + 1 is layer i as its codec wrote it

Every length is checked against the bytes that are there before anything is allocated; each stream has a checksum;
nothing is unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmcache_rag.chunk_kv import chunk_key
from lmcache_rag.errors import CorruptObjectError

FORMAT_VERSION = 1
_MAGIC = b"LMCRAGKV"
_PREFIX = struct.Struct("<8sIIQ")
_ALIGN = 64
_MAX_HEADER = 1 << 20


class _Stream(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int = Field(ge=0, lt=1 << 48)
    xxh3: int = Field(ge=0, lt=1 << 64)


class ObjectHeader(BaseModel):
    """What an object says of itself. `dtype` is a torch dtype's name, without `torch.`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespace: str
    model: str
    key: str
    variant: str
    codec: str
    tokens: int = Field(ge=1, lt=1 << 24)
    layers: int = Field(ge=1, lt=1 << 12)
    kv_heads: int = Field(ge=1, lt=1 << 12)
    head_size: int = Field(ge=1, lt=1 << 12)
    dtype: str
    streams: tuple[_Stream, ...] = ()

    @property
    def name(self) -> str:
        """Where the object belongs in a store."""
        folder = f"{self.namespace}/{self.model}/{self.key[:2]}/{self.key}"
        return f"{folder}/{self.variant}.{self.codec}.v{FORMAT_VERSION}"


@dataclass(frozen=True)
class StoredObject:
    """An unpacked object whose checksums were right; the streams are views of the bytes that it was unpacked from."""

    header: ObjectHeader
    token_ids: np.ndarray
    layers: tuple[memoryview, ...]


def pack(header: ObjectHeader, token_ids: np.ndarray, layers: Sequence[memoryview]) -> list[bytes | memoryview]:
    """The parts of an object, to be written one after another. `header.streams` is filled in here."""
    parts: list[bytes | memoryview] = [token_ids.astype("<i4").tobytes(), *layers]
    streams = tuple(_Stream(length=len(part), xxh3=xxhash.xxh3_64_intdigest(part)) for part in parts)
    text = header.model_copy(update={"streams": streams}).model_dump_json().encode()
    prefix = _PREFIX.pack(_MAGIC, FORMAT_VERSION, len(text), xxhash.xxh3_64_intdigest(text))
    written: list[bytes | memoryview] = [prefix + text]
    at = len(written[0])
    for part in parts:
        written += [bytes(-at % _ALIGN), part]
        at += -at % _ALIGN + len(part)
    return written


def unpack(data: memoryview) -> StoredObject:
    """Check and open an object.

    Raises:
        CorruptObjectError: it is cut short, of another version, or not what its checksums say.
    """
    header, at = _read_header(data)
    streams = []
    for number, stream in enumerate(header.streams):
        at += -at % _ALIGN
        content = data[at : at + stream.length]
        if len(content) != stream.length:
            raise CorruptObjectError(f"cut short in stream {number}")
        if xxhash.xxh3_64_intdigest(content) != stream.xxh3:
            raise CorruptObjectError(f"stream {number} has a wrong checksum")
        streams.append(content)
        at += stream.length
    if at != len(data):
        raise CorruptObjectError("longer than it says")
    return StoredObject(header, _token_ids(header, streams[0]), tuple(streams[1:]))


def peek_tokens(start: memoryview) -> np.ndarray | int:
    """The token ids from an object's first bytes, or how many bytes are needed where `start` holds too few.

    Raises:
        CorruptObjectError: as `unpack`.
    """
    if len(start) >= _PREFIX.size:
        needed = _PREFIX.size + _prefix(start)[0]
        if len(start) < needed:
            return needed
    header, at = _read_header(start)
    at += -at % _ALIGN
    content = start[at : at + header.streams[0].length]
    if len(content) < header.streams[0].length:
        return at + header.streams[0].length
    if xxhash.xxh3_64_intdigest(content) != header.streams[0].xxh3:
        raise CorruptObjectError("the token ids have a wrong checksum")
    return _token_ids(header, content)


def _prefix(data: memoryview) -> tuple[int, int]:
    """Header length and checksum."""
    if len(data) < _PREFIX.size:
        raise CorruptObjectError("cut short in its first bytes")
    magic, version, length, checksum = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise CorruptObjectError("not a stored KV object")
    if version != FORMAT_VERSION:
        raise CorruptObjectError(f"format version {version}, this release reads {FORMAT_VERSION}")
    if length > _MAX_HEADER:
        raise CorruptObjectError("its header is impossibly long")
    return length, checksum


def _read_header(data: memoryview) -> tuple[ObjectHeader, int]:
    """The header and the offset behind it."""
    length, checksum = _prefix(data)
    text = data[_PREFIX.size : _PREFIX.size + length]
    if len(text) != length or xxhash.xxh3_64_intdigest(text) != checksum:
        raise CorruptObjectError("its header is cut short or has a wrong checksum")
    try:
        header = ObjectHeader.model_validate_json(bytes(text))
    except ValidationError as error:
        raise CorruptObjectError("its header cannot be read") from error
    if len(header.streams) != header.layers + 1 or header.streams[0].length != 4 * header.tokens:
        raise CorruptObjectError("its header contradicts itself")
    return header, _PREFIX.size + length


def _token_ids(header: ObjectHeader, content: memoryview) -> np.ndarray:
    token_ids = np.frombuffer(content, dtype="<i4")
    if chunk_key(token_ids) != header.key:
        raise CorruptObjectError("its token ids are not those of its key")
    return token_ids
