"""The stored object: a header, then one stream of bytes for the token ids and one per layer. All numbers are
little-endian.

    offset   bytes  what
    0        8      magic "LMCRAGKV"
    8        4      format version
    12       4      N, the header's length
    16       8      XXH3-64 of the header
    24       N      header: `ObjectHeader` in JSON, then for each stream its length (4 bytes) and its XXH3-64 (8 bytes)
    ...             streams, each starting at a multiple of 8 bytes; stream 0 is the token ids as int32, stream i + 1
                    is layer i as its codec wrote it

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
from lmcache_rag.errors import CorruptObjectError, StoreError

FORMAT_VERSION = 2
_MAGIC = b"LMCRAGKV"
_PREFIX = struct.Struct("<8sIIQ")
_STREAM = np.dtype([("length", "<u4"), ("xxh3", "<u8")])
_ALIGN = 8
_MAX_HEADER = 1 << 20
_MAX_STREAM = (1 << 32) - 1


class ObjectHeader(BaseModel):
    """What an object says of itself.

    Attributes:
        codec: the level that it was written at.
        tables: digest of the tables that the codec needs; empty where it needs none.
        dtype: a torch dtype's name, without `torch.`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespace: str
    model: str
    key: str
    variant: str
    codec: str
    tables: str = ""
    tokens: int = Field(ge=1, lt=1 << 24)
    layers: int = Field(ge=1, lt=1 << 12)
    kv_heads: int = Field(ge=1, lt=1 << 12)
    head_size: int = Field(ge=1, lt=1 << 12)
    dtype: str

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
    """The parts of an object, to be written one after another."""
    parts: list[bytes | memoryview] = [token_ids.astype("<i4").tobytes(), *layers]
    if max(map(len, parts)) > _MAX_STREAM:
        raise StoreError("A layer's KV is longer than 4 GiB: split the documents into smaller chunks.")
    streams = np.array([(len(part), xxhash.xxh3_64_intdigest(part)) for part in parts], dtype=_STREAM)
    text = header.model_dump_json().encode() + streams.tobytes()
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
    header, streams, at = _read_header(data)
    contents = []
    for number, (length, checksum) in enumerate(streams):
        at += -at % _ALIGN
        content = data[at : at + length]
        if len(content) != length:
            raise CorruptObjectError(f"cut short in stream {number}")
        if xxhash.xxh3_64_intdigest(content) != checksum:
            raise CorruptObjectError(f"stream {number} has a wrong checksum")
        contents.append(content)
        at += length
    if at != len(data):
        raise CorruptObjectError("longer than it says")
    return StoredObject(header, _token_ids(header, contents[0]), tuple(contents[1:]))


def peek_tokens(start: memoryview) -> np.ndarray | int:
    """The token ids from an object's first bytes, or how many bytes are needed where `start` holds too few.

    Raises:
        CorruptObjectError: as `unpack`.
    """
    if len(start) >= _PREFIX.size:
        needed = _PREFIX.size + _prefix(start)[0]
        if len(start) < needed:
            return needed
    header, streams, at = _read_header(start)
    length, checksum = streams[0]
    at += -at % _ALIGN
    content = start[at : at + length]
    if len(content) < length:
        return at + length
    if xxhash.xxh3_64_intdigest(content) != checksum:
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


def _read_header(data: memoryview) -> tuple[ObjectHeader, list[tuple[int, int]], int]:
    """The header, length and checksum of each stream, and the offset behind them."""
    length, checksum = _prefix(data)
    text = bytes(data[_PREFIX.size : _PREFIX.size + length])
    if len(text) != length or xxhash.xxh3_64_intdigest(text) != checksum:
        raise CorruptObjectError("its header is cut short or has a wrong checksum")
    end = text.find(b"}") + 1
    try:
        header = ObjectHeader.model_validate_json(text[:end])
    except ValidationError as error:
        raise CorruptObjectError("its header cannot be read") from error
    if length - end != _STREAM.itemsize * (header.layers + 1):
        raise CorruptObjectError("its header contradicts itself")
    streams: list[tuple[int, int]] = np.frombuffer(text[end:], _STREAM).tolist()
    if streams[0][0] != 4 * header.tokens:
        raise CorruptObjectError("its header contradicts itself")
    return header, streams, _PREFIX.size + length


def _token_ids(header: ObjectHeader, content: memoryview) -> np.ndarray:
    token_ids = np.frombuffer(content, dtype="<i4")
    if chunk_key(token_ids) != header.key:
        raise CorruptObjectError("its token ids are not those of its key")
    return token_ids
