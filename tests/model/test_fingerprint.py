"""Fingerprints: another file, another name; and no weight file is read twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_rag.errors import ModelError
from lmcache_rag.model import model_fingerprint, resolve_model, tokenizer_fingerprint


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


def test_unknown_model_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="could not be fetched"):
        resolve_model("nobody/no-such-model")


def test_tokenizer(folder: Path) -> None:
    first = tokenizer_fingerprint(folder)
    (folder / "tokenizer.json").write_text('{"version": 2}')
    assert tokenizer_fingerprint(folder) != first
