"""What `lmcache-rag serve` starts vLLM's server with. `tests/vllm/test_server.py` starts one."""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lmcache_rag.corpus import Manifest
from lmcache_rag.errors import CorpusError
from lmcache_rag.prompt import completion_format
from lmcache_rag.serving import server_command
from lmcache_rag.vllm.config import ConnectorConfig
from tests.models import make_tiny


def made_index(folder: Path, **fields: object) -> Path:
    """An index without documents, of a tiny model."""
    model = make_tiny("llama", folder / "model")
    index = folder / "index"
    index.mkdir()
    manifest = {
        "model": str(model), "model_fingerprint": "", "dtype": "float32", "tokenizer_fingerprint": "",
        "namespace": "mine", "store": Path("kv"), "codec": "q8", "prompt": completion_format(), "chunk_tokens": 512,
        "overlap_tokens": 0, "embedding_model": "none",
    }  # fmt: skip
    Manifest(**{**manifest, **fields}).write(index)
    return index


def test_the_server_is_set_as_the_index_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.delenv("LMCACHE_RAG_CODEC", raising=False)
    index = made_index(tmp_path)
    command, environment = server_command(index, {"clients_precompute": True}, threads=1)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = dict(pairwise(command))
    assert flags["--model"] == flags["--served-model-name"] == str(tmp_path / "model")
    assert flags["--dtype"] == "float32" and "--enforce-eager" in command
    assert flags["--worker-cls"] == "lmcache_rag.vllm.worker.BlendWorker"
    assert environment == {"VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))}
    transfer = json.loads(flags["--kv-transfer-config"])
    assert transfer["kv_load_failure_policy"] == "recompute"
    config = ConnectorConfig(**transfer["kv_connector_extra_config"])
    assert (config.store, config.namespace, config.codec) == (str(index / "kv"), "mine", "q8")
    assert config.clients_precompute and not config.clients_choose_namespace


def test_the_users_own_binding_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    _, environment = server_command(made_index(tmp_path))
    assert environment == {}


def test_a_folder_without_an_index_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="There is no index in"):
        server_command(tmp_path)
