"""The codec of a running engine's model: learning its tables where there are none yet."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lmcache_rag.codec import LEVELS
from lmcache_rag.codec.texts import built_in_texts, learning_prompts, mixed
from lmcache_rag.errors import StoreError
from lmcache_rag.prompt import PromptPlan, model_format
from lmcache_rag.store.tables import TableStore, machine_store

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lmcache_rag.codec.tables import CodecTables
    from lmcache_rag.engine.local import LocalEngine


def ensure_codec(engine: LocalEngine, texts: Iterable[str] = (), progress: Callable[[str], Any] | None = None) -> None:
    """Learn the codec's tables where it needs some, and neither the store nor this machine has them: minutes of
    computing, once per model.

    Args:
        texts: to learn from, together with built-in ones; texts like those that will be stored make KV smaller.
        progress: is told how far it is; without, a line on standard error says that it takes minutes.

    Raises:
        ModelError: they cannot be learned from this model.
        StoreError: they cannot be kept.
    """
    levels = (engine.settings.codec, *engine.settings.extra_codecs)
    if not any(LEVELS[level].learned for level in levels):
        return
    with engine.learning:
        if engine.codec_ready:
            return
        if engine.tables.last() is None:
            own = machine_store()
            tables = None if own is None else TableStore(own, engine.model_fingerprint).last()
            if tables is None:
                prompts = mixed(prompts_for(engine, texts), prompts_for(engine, built_in_texts()))
                tables = learn_codec(engine, prompts, progress)
            keep_codec(engine, tables)
        engine.codec_ready = True


def keep_codec(engine: LocalEngine, tables: CodecTables) -> None:
    """Keep tables for what engines store that are started on this machine or with this store. Raises `StoreError`
    where the store cannot be written to; that this machine's folder cannot is only noted."""
    engine.tables.add(tables)
    own = machine_store()
    if own is not None:
        try:
            TableStore(own, engine.model_fingerprint).add(tables)
        except StoreError as error:
            _log.warning("the codec's tables are kept in this store only (%s)", error)


def learn_codec(
    engine: LocalEngine, prompts: Sequence[PromptPlan], progress: Callable[[str], Any] | None = None
) -> CodecTables:
    """Learn the codec's tables from prompts. Raises `ModelError`."""
    import torch

    from lmcache_rag.codec.learning import learn
    from lmcache_rag.vllm.worker import bound_model

    def say(done: int) -> None:
        if progress is not None:
            progress(f"Learning the KV codec of {engine.settings.model}, once: {done} of {len(prompts)}")
        elif not done:
            note = f"Learning the KV codec of {engine.settings.model}, once for this model. This takes minutes."
            print(note, file=sys.stderr, flush=True)

    say(0)
    model = bound_model()
    dtype = torch.float32 if model.device.type == "cpu" else model.shape.dtype
    rotations = [spec.rotation for spec in model.specs]
    return learn(engine.model_folder, dtype, model.device, rotations, prompts, say)


def prompts_for(engine: LocalEngine, texts: Iterable[str]) -> list[PromptPlan]:
    """Prompts over passages of the texts, to learn from."""
    return learning_prompts(engine.tokenizer, model_format(engine.tokenizer), texts, engine.max_model_len)
