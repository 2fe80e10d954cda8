"""Where stored objects live, and the catalog of what is stored."""

from lmcache_rag.store.base import Store
from lmcache_rag.store.catalog import Catalog, Match
from lmcache_rag.store.chunks import ChunkStore
from lmcache_rag.store.disk import DiskStore

__all__ = ["Catalog", "ChunkStore", "DiskStore", "Match", "Store"]
