"""The model's files: found, prepared where it is the default one, and fingerprinted."""

from lmcache_rag.model.default import DEFAULT_MODEL, is_default_model, prepare_default_model
from lmcache_rag.model.fingerprint import model_fingerprint, tokenizer_fingerprint
from lmcache_rag.model.resolve import cache_folder, resolve_model
from lmcache_rag.model.template import chat_template

__all__ = [
    "DEFAULT_MODEL",
    "cache_folder",
    "chat_template",
    "is_default_model",
    "model_fingerprint",
    "prepare_default_model",
    "resolve_model",
    "tokenizer_fingerprint",
]
