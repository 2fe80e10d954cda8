"""A model's identity: the digest of its config and weights. KV of one fingerprint is never used for another."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from lmcache_rag.errors import ModelError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")


def model_fingerprint(folder: Path, dtype: str, cache: Path) -> str:
    """32 hex digits that name the model in `folder` computed in `dtype`.

    Reading gigabytes of weights takes seconds, so each file's digest is kept in `cache`, valid while the file's size
    and modification time stay the same.

    Raises:
        ModelError: the folder holds no config or no weights.
    """
    config = folder / "config.json"
    weights = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not config.is_file() or not weights:
        raise ModelError(f"{folder} has no config.json or no weight files: name a folder that holds a complete model.")
    digest = hashlib.blake2b(digest_size=16)
    digest.update(dtype.encode())
    digest.update(config.read_bytes())
    for path, content in zip(weights, _digests(weights, cache), strict=True):
        digest.update(f"{path.name}:{content};".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """32 hex digits that name the tokenizer in `folder`."""
    digest = hashlib.blake2b(digest_size=16)
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(f"{name}:{_digest(path)};".encode())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digests(paths: list[Path], cache: Path) -> list[str]:
    """Digests of `paths`, taken from and kept in one small JSON file per model folder."""
    folder_name = hashlib.blake2b(str(paths[0].resolve().parent).encode(), digest_size=8).hexdigest()
    kept_in = cache / "digests" / f"{folder_name}.json"
    try:
        known = json.loads(kept_in.read_text())
    except (OSError, ValueError):
        known = {}
    result, changed = [], False
    for path in paths:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = known.get(path.name) if isinstance(known, dict) else None
        if not (isinstance(entry, list) and entry[:2] == stamp):
            entry = [*stamp, _digest(path)]
            known[path.name] = entry
            changed = True
        result.append(entry[2])
    if changed:
        _keep(kept_in, known)
    return result


def _keep(path: Path, known: dict[str, list[object]]) -> None:
    """Write the digests whole or not at all. A cache that cannot be written costs time only, so it is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
            json.dump(known, file)
        os.replace(file.name, path)
    except OSError:
        return
