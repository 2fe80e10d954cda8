"""ChunkKV to bytes and back: one codec a file, one registry, and the container that every codec's bytes lie in."""

from lmcache_rag.codec.base import Codec
from lmcache_rag.codec.container import ObjectHeader, StoredObject, pack, peek_tokens, unpack
from lmcache_rag.codec.levels import DEFAULT_LEVEL, LEVELS, LOSSLESS_LEVEL, Level, level_named

__all__ = [
    "DEFAULT_LEVEL",
    "LEVELS",
    "LOSSLESS_LEVEL",
    "Codec",
    "Level",
    "ObjectHeader",
    "StoredObject",
    "level_named",
    "pack",
    "peek_tokens",
    "unpack",
]
