"""The default model: prepared once, verified, and resumed where it was interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lmcache_rag.errors import ModelError
from lmcache_rag.model import DEFAULT_MODEL, cache_folder, default, prepare_default_model


def test_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare_default_model(cache_folder())
    assert (folder / "model.safetensors").stat().st_size > 500e6
    monkeypatch.setattr(default, "_gguf_file", lambda _: pytest.fail("prepared again"))
    assert prepare_default_model(cache_folder()) == folder


def test_an_interrupted_preparation_goes_on_with_the_fetched_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_default_model(cache_folder())
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    shutil.copy(cache_folder() / "downloads" / default._GGUF, downloads)
    half = tmp_path / "models" / DEFAULT_MODEL
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("fetched again"))
    folder = prepare_default_model(tmp_path)
    assert (folder / "model.safetensors").stat().st_size > 500e6


def test_an_unreachable_index_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match="could not be fetched"):
        prepare_default_model(tmp_path)
    assert not list((tmp_path / "downloads").iterdir())


def test_a_damaged_download_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / default._GGUF).write_bytes(b"damaged")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match="could not be fetched"):
        prepare_default_model(tmp_path)


def test_a_full_disk_is_said_in_words(full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "_gguf_file", lambda _: Path(__file__))

    def write(_gguf: Path, folder: Path) -> None:
        (folder.parent / "big").write_bytes(bytes(2 << 20))

    monkeypatch.setattr(default, "_write_folder", write)
    with pytest.raises(ModelError, match="free some space"):
        prepare_default_model(full_disk)
