"""Documents to chunks to an index: which passages answer a question, with their KV precomputed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_rag.corpus.conversation import Conversation
    from lmcache_rag.corpus.corpus import Corpus, Hit, updating
    from lmcache_rag.corpus.documents import Document, find_files, read_document
    from lmcache_rag.corpus.embedder import DEFAULT_EMBEDDING_MODEL, Embedder, SentenceEmbedder
    from lmcache_rag.corpus.manifest import Manifest
    from lmcache_rag.corpus.opening import IndexSettings, open_corpus, open_remotely, open_through
    from lmcache_rag.corpus.updates import UpdatePlan, UpdateReport

__all__ = [
    "DEFAULT_EMBEDDING_MODEL",
    "Conversation",
    "Corpus",
    "Document",
    "Embedder",
    "Hit",
    "IndexSettings",
    "Manifest",
    "SentenceEmbedder",
    "UpdatePlan",
    "UpdateReport",
    "find_files",
    "open_corpus",
    "open_remotely",
    "open_through",
    "read_document",
    "updating",
]

_MODULES = {
    "conversation": ("Conversation",),
    "corpus": ("Corpus", "Hit", "updating"),
    "documents": ("Document", "find_files", "read_document"),
    "embedder": ("DEFAULT_EMBEDDING_MODEL", "Embedder", "SentenceEmbedder"),
    "manifest": ("Manifest",),
    "opening": ("IndexSettings", "open_corpus", "open_remotely", "open_through"),
    "updates": ("UpdatePlan", "UpdateReport"),
}
"""Loaded when they are asked for: the embedding model is used where there is no engine, too."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"lmcache_rag.corpus.{module}"), name)
    raise AttributeError(f"module 'lmcache_rag.corpus' has no attribute {name!r}")
