"""The tables that come with the package: of the default model, and of no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import KVShape
from lmcache_rag.learn import codec as learning
from lmcache_rag.learn.codec import CodecLearning, LearnedModel
from lmcache_rag.learn.shipped import shipped_tables
from lmcache_rag.library.tables import ModelCodecs, TableStore
from lmcache_rag.model import resolve_model
from lmcache_rag.model.default import DEFAULT_MODEL


def test_they_are_the_default_models(tmp_path: Path) -> None:
    tables = shipped_tables(resolve_model(DEFAULT_MODEL))
    assert tables is not None and tables.directions.shape == (30, 2, 1, 192, 192)
    (tmp_path / "config.json").write_text("{}")
    assert shipped_tables(tmp_path) is None


def test_nothing_is_learned_where_the_package_has_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model(DEFAULT_MODEL)
    tables = shipped_tables(folder)
    assert tables is not None
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(CodecLearning, "learn", lambda *_: pytest.fail("learned"))
    stored = TableStore(DiskStore(tmp_path / "kv"), "model")
    model = LearnedModel(DEFAULT_MODEL, folder, "model", None, 64, torch.float32, torch.device("cpu"), [])  # type: ignore[arg-type]
    CodecLearning(model, ["balanced"], stored).ensure()
    own = learning.machine_store()
    assert own is not None
    for found in (stored.last(), TableStore(own, "model").last()):
        assert found is not None and found.digest == tables.digest


def test_a_server_codes_with_them_where_neither_store_nor_machine_has_any(tmp_path: Path) -> None:
    tables = shipped_tables(resolve_model(DEFAULT_MODEL))
    assert tables is not None
    store, shape = DiskStore(tmp_path), KVShape(30, 3, 64, torch.float32)
    _, digest = ModelCodecs(store, "model", shape, None, lambda: tables).for_writing("balanced")
    assert digest == tables.digest
    assert ModelCodecs(store, "model", shape).for_reading("balanced", digest) is not None
