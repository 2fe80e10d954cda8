"""Texts to vectors, where several ask at once, and where there is no engine."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lmcache_rag.corpus import SentenceEmbedder

TEXTS = [f"Passage {number} tells of the wind " + "and of the rain " * number for number in range(24)]


def test_one_thread_at_a_time_asks_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer is set up anew for each call, and refuses where another thread uses it."""
    embedder, inside = SentenceEmbedder(), threading.Lock()
    embedder.embed(TEXTS[:1])
    encode = embedder._model.encode

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert inside.acquire(blocking=False), "two threads at once"
        try:
            return encode(*args, **kwargs)
        finally:
            inside.release()

    monkeypatch.setattr(embedder._model, "encode", watched)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: embedder.embed([text]), TEXTS))


def test_several_threads_get_what_one_gets() -> None:
    alone, together = SentenceEmbedder(), SentenceEmbedder()
    expected = np.concatenate([alone.embed([text]) for text in TEXTS])
    with ThreadPoolExecutor(8) as pool:
        found = np.concatenate(list(pool.map(lambda text: together.embed([text]), TEXTS)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_copy_embeds_alike() -> None:
    embedder = SentenceEmbedder()
    expected = embedder.embed(TEXTS[:2])
    copied = pickle.loads(pickle.dumps(embedder))
    assert copied.name == embedder.name
    np.testing.assert_allclose(copied.embed(TEXTS[:2]), expected, atol=1e-5)


@pytest.mark.parametrize(
    "imported",
    [
        "from langchain_lmcache_rag import LocalEmbeddings; LocalEmbeddings()._embedder",
        "from llama_index.llms.lmcache_rag.embedding import LocalEmbedding; LocalEmbedding()",
    ],
)
def test_clients_of_a_server_have_it_without_an_engine(imported: str) -> None:
    """They have neither vllm nor our kernels."""
    code = f"import sys; sys.modules.update(vllm=None, lmcache_rag_kernels=None); {imported}"
    subprocess.run([sys.executable, "-c", code], check=True)
