"""What `lmcache-rag serve` starts vLLM's server with. `tests/vllm/test_server.py` starts one."""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lmcache_rag.cli.serve import _split, server_command, settings_of
from lmcache_rag.corpus import Manifest
from lmcache_rag.errors import CorpusError, EngineError
from lmcache_rag.model import chat_template
from lmcache_rag.prompt import completion_format
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
    command, environment = server_command(settings_of(index, threads=1), {"clients_precompute": True})
    model = str(tmp_path / "model")
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = dict(pairwise(command))
    assert flags["--model"] == flags["--served-model-name"] == model
    assert "--max-num-seqs" not in flags
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
    _, environment = server_command(settings_of(made_index(tmp_path)))
    assert environment == {}


def test_a_folder_without_an_index_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"There is no index in .* or name a model"):
        settings_of(tmp_path)
    with pytest.raises(CorpusError, match="has a store of its own"):
        settings_of(made_index(tmp_path), store="s3://other/kv")


def offers_tools(flags: dict[str, str]) -> bool:
    """What clients are told."""
    return bool(json.loads(flags["--kv-transfer-config"])["kv_connector_extra_config"]["offers_tools"])


def test_a_model_is_served_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path / "cache"))
    model = make_tiny("llama", tmp_path / "model")
    assert settings_of(None, model=str(model)).store == str(tmp_path / "cache" / "kv")
    monkeypatch.setenv("LMCACHE_RAG_STORE", "redis://of-the-environment:1/0")
    assert settings_of(None, model=str(model)).store == "redis://of-the-environment:1/0"
    settings = settings_of(None, model=str(model), store="redis://host:1/0", namespace="mine")
    assert (settings.store, settings.namespace) == ("redis://host:1/0", "mine")
    assert not offers_tools(dict(pairwise(server_command(settings)[0])))
    limited = settings_of(None, model=str(model), max_num_seqs=3)
    assert dict(pairwise(server_command(limited)[0]))["--max-num-seqs"] == "3"
    (model / "chat_template.jinja").write_text("{% if tools %}[TOOL_CALLS]{% endif %}")
    flags = dict(pairwise(server_command(settings)[0]))
    assert flags["--tool-call-parser"] == "mistral" and offers_tools(flags)


def test_options_of_vllm_are_passed_on_and_ours_are_not(tmp_path: Path) -> None:
    assert _split(["org/model", "--max-model-len", "4096"]) == ("org/model", ["--max-model-len", "4096"])
    assert _split(["--max-model-len", "4096"]) == (None, ["--max-model-len", "4096"])
    parts = ("--kv-transfer-config.kv_role", "--kv_transfer_config.kv_connector_extra_config.clients_precompute=true")
    whole = ("--api-server-count=2", "--kv-transfer-config={}", "--worker-cls", "--worker_cls")
    for option in (*whole, "--worker-c", "--kv-transfer", *parts):
        with pytest.raises(EngineError, match="leave it out"):
            _split(["org/model", option, "{}"])


def test_a_template_is_found_in_either_file(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "a"}]}))
    assert chat_template(tmp_path) == {"default": "a"}
    config.write_text(json.dumps({"chat_template": "b"}))
    assert chat_template(tmp_path) == "b"
    (tmp_path / "chat_template.jinja").write_text("c")
    assert chat_template(tmp_path) == "c"
