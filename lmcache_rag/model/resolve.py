"""From what the user names (a Hugging Face id, a folder, or nothing) to a folder with the model's files."""

from __future__ import annotations

import os
from pathlib import Path

from lmcache_rag.errors import ModelError
from lmcache_rag.model.default import DEFAULT_MODEL, prepare_default_model


def cache_folder() -> Path:
    """Where prepared models and weight digests are kept: `$LMCACHE_RAG_CACHE`, else the user's cache folder."""
    named = os.environ.get("LMCACHE_RAG_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcache-rag"


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder of `model`, downloaded or prepared if need be.

    Raises:
        ModelError: it is neither a model folder nor a Hugging Face id that can be fetched.
    """
    if model == DEFAULT_MODEL:
        return prepare_default_model(cache_folder())
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json: name a folder that holds a Hugging Face model.")
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, ignore_patterns=["*.gguf", "*.onnx", "*.pth", "original/*"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"Model {model!r} is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}): check its name and the network, or name a local folder."
        ) from error
