"""ChunkKV to bytes and back: one codec a file, one registry, and the container that every codec's bytes lie in."""

from lmcache_rag.codec.base import Codec
from lmcache_rag.codec.container import ObjectHeader, StoredObject, pack, peek_tokens, unpack
from lmcache_rag.codec.raw import RawCodec

CODECS: dict[str, Codec] = {codec.name: codec for codec in (RawCodec(),)}

__all__ = ["CODECS", "Codec", "ObjectHeader", "StoredObject", "pack", "peek_tokens", "unpack"]
