"""Why a prompt over an index, or over a store, would or would not be answered from stored KV; without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache_rag.blobs.base import Store
from lmcache_rag.blobs.uri import open_existing
from lmcache_rag.codec import DEFAULT_CODEC
from lmcache_rag.corpus.manifest import Manifest
from lmcache_rag.errors import CorpusError, PromptError
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.scopes import fingerprints_in
from lmcache_rag.model import cache_folder, resolve_model
from lmcache_rag.plan.budget import Calibration
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.plan.planner import Planner
from lmcache_rag.plan.why import explain
from lmcache_rag.prompt import encode
from lmcache_rag.records.fingerprints import SHORTEST
from lmcache_rag.request import DEFAULT_NAMESPACE

_MAX_TOKENS = 1 << 20


def explained(
    prompt: Path, index: Path | None, store: Store | None, model: str | None, namespace: str | None
) -> tuple[list[dict[str, Any]], str]:
    """See `explain`; the prompt is the text of a file.

    Args:
        store: and `model`, where there is no index.

    Raises:
        CorpusError: there is no index, or the store holds KV of none or several models.
        PromptError: the file cannot be read as text.
        ModelError: the model cannot be found.
    """
    from transformers import AutoTokenizer

    codec = DEFAULT_CODEC
    if index is not None:
        manifest = Manifest.read(index.expanduser())
        if manifest is None:
            raise CorpusError(f"There is no index in {index}: name one with --index, or --store and --model.")
        model, namespace, codec = model or manifest.model, namespace or manifest.namespace, manifest.codec
        fingerprints = {manifest.model_fingerprint}
        store = store or open_existing(manifest.store_uri(index.expanduser()))
    elif store is not None and model is not None:
        namespace = namespace or DEFAULT_NAMESPACE
        fingerprints = fingerprints_in(store, namespace)
    else:
        raise CorpusError("Name an index with --index, or a store with --store and its model with --model.")
    if len(fingerprints) != 1:
        raise CorpusError(
            f"The store holds KV of {len(fingerprints)} models or compute types in {namespace}: name an index."
        )
    try:
        text = prompt.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{prompt} cannot be read as text ({error}): name a UTF-8 file.") from error
    fingerprint = fingerprints.pop()
    chunks = ChunkStores(store, fingerprint, codec)
    calibration = Calibration.read(cache_folder(), fingerprint, codec)
    planner = Planner(
        chunks,
        calibration,
        namespace=namespace,
        matcher=Matcher(),
        max_tokens=_MAX_TOKENS,
        never_slower=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(resolve_model(model)))
    return explain(planner, chunks, namespace, encode(tokenizer, text), SHORTEST)
