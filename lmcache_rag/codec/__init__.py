"""ChunkKV to bytes and back: one codec a file, one registry, and the container that every codec's bytes lie in."""

from lmcache_rag.codec.base import Codec
from lmcache_rag.codec.container import (
    BaseObject,
    ObjectHeader,
    ObjectIndex,
    StoredObject,
    open_index,
    pack,
    unpack,
    unpack_range,
)
from lmcache_rag.codec.registry import CODECS, DEFAULT_CODEC, LOSSLESS_CODEC, NamedCodec, codec_named, coded_bytes

__all__ = [
    "CODECS",
    "DEFAULT_CODEC",
    "LOSSLESS_CODEC",
    "BaseObject",
    "Codec",
    "NamedCodec",
    "ObjectHeader",
    "ObjectIndex",
    "StoredObject",
    "codec_named",
    "coded_bytes",
    "open_index",
    "pack",
    "unpack",
    "unpack_range",
]
