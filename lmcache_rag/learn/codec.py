"""A model's codec tables where an engine runs: found, or learned once, and kept."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_rag.codec import CODECS
from lmcache_rag.errors import StoreError
from lmcache_rag.learn.shipped import shipped_tables
from lmcache_rag.learn.texts import built_in_texts, learning_prompts, mixed
from lmcache_rag.library.tables import TableStore, machine_store
from lmcache_rag.process import OwnProcess
from lmcache_rag.prompt import MarkedPrompt, Tokenizer, model_format

if TYPE_CHECKING:
    import torch
    from lmcache_rag_kernels import Rotation

    from lmcache_rag.codec.tables import CodecTables

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnedModel:
    """The model that tables are learned of.

    Attributes:
        name: as the user named it.
        fingerprint: of its KV.
        longest: its context, in tokens.
        dtype, device: to compute with.
        rotations: RoPE of each layer.
    """

    name: str
    folder: Path
    fingerprint: str
    tokenizer: Tokenizer
    longest: int
    dtype: torch.dtype
    device: torch.device
    rotations: Sequence[Rotation | None]


class CodecLearning:
    """The codec tables of one model, for what an engine stores.

    Args:
        codecs: in which KV is stored.
        tables: of the model, in the engine's store.
    """

    def __init__(self, model: LearnedModel, codecs: Iterable[str], tables: TableStore) -> None:
        self.tables = tables
        self._model = model
        self._needed = any(CODECS[codec].learned for codec in codecs)
        self._process = OwnProcess("The engine")
        self._lock = threading.Lock()
        self._ready = not self._needed

    def ensure(self, texts: Iterable[str] = (), progress: Callable[[str], Any] | None = None) -> None:
        """Learn the tables where the codec needs some, and neither the store, this machine, nor this package has them:
        minutes of computing, once per model.

        Args:
            texts: to learn from, together with built-in ones; texts like those that will be stored make KV smaller.
            progress: is told how far it is; without, a line on standard error says that it takes minutes.

        Raises:
            ModelError: they cannot be learned from this model.
            StoreError: they cannot be kept.
        """
        self._process.check()
        with self._lock:
            if self._ready:
                return
            if self.tables.last() is None:
                own = machine_store()
                tables = None if own is None else TableStore(own, self._model.fingerprint).last()
                tables = tables or shipped_tables(self._model.folder)
                if tables is None:
                    tables = self.learn(mixed(self.prompts(texts), self.prompts(built_in_texts())), progress)
                self.keep(tables)
            self._ready = True

    def keep(self, tables: CodecTables) -> None:
        """Keep tables for what engines store that are started on this machine or with this store. Raises `StoreError`
        where the store cannot be written to; that this machine's folder cannot is only noted."""
        self.tables.add(tables)
        own = machine_store()
        if own is not None:
            try:
                TableStore(own, self._model.fingerprint).add(tables)
            except StoreError as error:
                _log.warning("the codec's tables are kept in this store only (%s)", error)

    def learn(self, prompts: Sequence[MarkedPrompt], progress: Callable[[str], Any] | None = None) -> CodecTables:
        """Learn the tables from prompts. Raises `ModelError`."""
        from lmcache_rag.learn.tables import learn

        model = self._model

        def say(done: int) -> None:
            if progress is not None:
                progress(f"Learning the KV codec of {model.name}, once: {done} of {len(prompts)}")
            elif not done:
                note = f"Learning the KV codec of {model.name}, once for this model. This takes minutes."
                print(note, file=sys.stderr, flush=True)

        say(0)
        return learn(model.folder, model.dtype, model.device, model.rotations, prompts, say)

    def prompts(self, texts: Iterable[str]) -> list[MarkedPrompt]:
        """Prompts over passages of the texts, to learn from."""
        return learning_prompts(self._model.tokenizer, model_format(self._model.tokenizer), texts, self._model.longest)
