"""Documents to chunks to an index: which passages answer a question, with their KV precomputed."""

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
