"""Fingerprints: another file, another name; and no weight file is read twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmcache_rag.errors import ModelError
from lmcache_rag.model import model_fingerprint, resolve_model, tokenizer_fingerprint
from tests.models import make_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 4}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_depends_on_config_weights_and_dtype(folder: Path, tmp_path: Path) -> None:
    found = [model_fingerprint(folder, "float32", tmp_path), model_fingerprint(folder, "bfloat16", tmp_path)]
    (folder / "config.json").write_text('{"hidden_size": 8}')
    found.append(model_fingerprint(folder, "float32", tmp_path))
    (folder / "model.safetensors").write_bytes(b"other weights")
    found.append(model_fingerprint(folder, "float32", tmp_path))
    (folder / "more.safetensors").write_bytes(b"")
    found.append(model_fingerprint(folder, "float32", tmp_path))
    assert len(set(found)) == len(found)
    assert all(len(name) == 32 for name in found)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "sliding_window": None,
    "torch_dtype": "float32",
    "quantization_config": {"bits": 4},
    "_name_or_path": "somewhere",
    "transformers_version": "4.40.0",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "/elsewhere", "transformers_version": "5.19.0", "use_cache": False},
        {"torch_dtype": None, "dtype": "float32"},
        {"torch_dtype": "torch.float32"},
        {"rope_theta": 10000},
        {"eos_token_id": [2, 3], "id2label": {"0": "a"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_saved_anew_is_the_same_model(folder: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    first = model_fingerprint(folder, "float32", tmp_path)
    again = {name: value for name, value in {**CONFIG, **changes}.items() if not (name in changes and value is None)}
    (folder / "config.json").write_text(json.dumps(dict(reversed(again.items())), indent=4) + "\n")
    assert model_fingerprint(folder, "float32", tmp_path) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-6},
        {"rope_theta": 20000.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"sliding_window": 4096},
        {"torch_dtype": "bfloat16"},
        {"quantization_config": {"bits": 8}},
        {"architectures": ["MistralForCausalLM"]},
        {"something_new": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_may_change_kv_makes_another_model(folder: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    first = model_fingerprint(folder, "float32", tmp_path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    assert model_fingerprint(folder, "float32", tmp_path) != first


def test_a_model_that_was_loaded_and_saved_is_the_same_one(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = make_tiny("llama3-rope", tmp_path / "model")
    first = model_fingerprint(folder, "float32", tmp_path), tokenizer_fingerprint(folder)
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert (model_fingerprint(folder, "float32", tmp_path), tokenizer_fingerprint(folder)) == first


def test_only_weights_that_would_be_loaded_count(folder: Path, tmp_path: Path) -> None:
    first = model_fingerprint(folder, "float32", tmp_path)
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin", "model.gguf", "notes.txt"):
        (folder / name).write_bytes(b"something")
    assert model_fingerprint(folder, "float32", tmp_path) == first
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert model_fingerprint(folder, "float32", tmp_path) == first
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"layer": "model-00001-of-00001.safetensors"}})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"loaded only where it is asked for")
    assert model_fingerprint(folder, "float32", tmp_path) == first
    (folder / "consolidated.safetensors").write_bytes(b"what vLLM prefers")
    assert model_fingerprint(folder, "float32", tmp_path) != first


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_other_formats_beside_a_trainers_files(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    first = model_fingerprint(folder, "float32", tmp_path)
    for other in ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt"):
        (folder / other).write_bytes(b"something")
    assert model_fingerprint(folder, "float32", tmp_path) == first
    (folder / name).write_bytes(b"other weights")
    assert model_fingerprint(folder, "float32", tmp_path) != first


def test_a_quantisation_config_counts(folder: Path, tmp_path: Path) -> None:
    first = model_fingerprint(folder, "float32", tmp_path)
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    assert model_fingerprint(folder, "float32", tmp_path) != first


def test_digests_are_kept(folder: Path, tmp_path: Path) -> None:
    first = model_fingerprint(folder, "float32", tmp_path / "cache")
    weights = folder / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"WEIGHTS")  # same size and time: taken for the same file
    import os

    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert model_fingerprint(folder, "float32", tmp_path / "cache") == first
    assert model_fingerprint(folder, "float32", tmp_path / "another cache") != first


def test_a_damaged_or_unwritable_cache_only_costs_time(folder: Path, tmp_path: Path) -> None:
    first = model_fingerprint(folder, "float32", tmp_path / "cache")
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    kept.write_text("nonsense")
    assert model_fingerprint(folder, "float32", tmp_path / "cache") == first
    (tmp_path / "file").write_text("")
    assert model_fingerprint(folder, "float32", tmp_path / "file" / "cache") == first


def test_incomplete_folders_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds a complete model"):
        model_fingerprint(tmp_path, "float32", tmp_path)
    with pytest.raises(ModelError, match="has no config"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is no JSON object"):
        model_fingerprint(tmp_path, "float32", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        model_fingerprint(tmp_path, "float32", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(ModelError, match=r"\(model-2\.safetensors\)"):
        model_fingerprint(tmp_path, "float32", tmp_path)


def test_unknown_model_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="could not be fetched"):
        resolve_model("nobody/no-such-model")


def test_tokenizer(folder: Path) -> None:
    first = tokenizer_fingerprint(folder)
    (folder / "tokenizer.json").write_text('{"version": 2}')
    changed = tokenizer_fingerprint(folder)
    assert changed != first
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "tokenizer_class": "Llama"}')
    assert tokenizer_fingerprint(folder) not in (first, changed)


def test_a_tokenizer_saved_anew_is_the_same_one(folder: Path) -> None:
    config = {"add_bos_token": True, "tokenizer_class": "Llama", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    first = tokenizer_fingerprint(folder)
    again = {"tokenizer_class": "Llama", "transformers_version": "5", "model_max_length": 8192, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(again, indent=2))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "merges.txt").write_text("of the slower one")
    assert tokenizer_fingerprint(folder) == first
