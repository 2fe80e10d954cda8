"""Errors of lmcache-rag. Every message is one or two sentences: what is wrong, and what to do about it."""


class LmcacheRagError(Exception):
    """Base of every error that a user can cause and mend."""


class ModelError(LmcacheRagError):
    """The model cannot be found, prepared, or blended."""


class StoreError(LmcacheRagError):
    """The KV store cannot be read or written."""


class CorruptObjectError(StoreError):
    """A stored object does not have the form or the checksums that it claims."""


class CorpusError(LmcacheRagError):
    """The documents or the index cannot be used."""


class PromptError(LmcacheRagError):
    """The prompt does not fit the model, or its parts do not fit together."""


class CutOffError(PromptError, ValueError):
    """A structured answer is cut off by `max_tokens`. A ValueError too, as frameworks take what cannot be read."""


class EngineError(LmcacheRagError):
    """vLLM cannot be started, or has stopped."""
