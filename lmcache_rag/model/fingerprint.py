"""A model's identity: the digest of its config and weights. KV of one fingerprint is never used for another.

What cannot change KV is left out, so that a config saved anew or a file beside the weights makes no other model of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from lmcache_rag.errors import ModelError

_CONFIG = "config.json"
_QUANTIZATION = ("quant_config.json", "quantize_config.json", "hf_quant_config.json")
_CONSOLIDATED = "consolidated*.safetensors"
_SAFETENSORS = "*.safetensors"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.gguf")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_TOKENIZER = "tokenizer.json"
_TOKENIZER_PARTS = ("tokenizer.model", "vocab.json", "merges.txt")
_TOKENIZER_CONFIG = "tokenizer_config.json"

_BOOKKEEPING = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_from_model_config",
        "_model_name_or_path",
        "_name_or_path",
        "attn_implementation",
        "name_or_path",
        "processor_class",
        "transformers_version",
    }
)
_HARMLESS = _BOOKKEEPING | frozenset(
    {
        "bos_token_id",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "torchscript",
        "unk_token_id",
        "use_cache",
    }
)
"""Keys of a config that cannot change KV: where it comes from, what is returned, where answers end, what classes are
called. All others are taken to."""
_HARMLESS_TO_TOKENS = _BOOKKEEPING | frozenset(
    {
        "chat_template",
        "clean_up_tokenization_spaces",
        "is_local",
        "local_files_only",
        "model_input_names",
        "model_max_length",
        "padding_side",
        "special_tokens_map_file",
        "truncation_side",
    }
)
"""Keys of a tokenizer's config that cannot change a text's tokens. A chat template's text lies in the prompt's form."""


def model_fingerprint(folder: Path, dtype: str, cache: Path) -> str:
    """32 hex digits that name the model in `folder` computed in `dtype`.

    Reading gigabytes of weights takes seconds, so each file's digest is kept in `cache`, valid while the file's size
    and modification time stay the same.

    Raises:
        ModelError: the folder holds no config or no weights, or they cannot be read.
    """
    weights = _weight_files(folder)
    if not (folder / _CONFIG).is_file() or not weights:
        raise ModelError(f"{folder} has no config.json or no weight files: name a folder that holds a complete model.")
    digest = hashlib.blake2b(digest_size=16)
    digest.update(dtype.encode())
    for name in (_CONFIG, *_QUANTIZATION):
        if (folder / name).is_file():
            digest.update(f"{_canonical(_read(folder / name), _HARMLESS)};".encode())
    for content in sorted(_digests(weights, cache)):  # by what they hold: how they are called means nothing
        digest.update(f"{content};".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """32 hex digits that name the tokenizer in `folder`. Raises `ModelError`."""
    digest = hashlib.blake2b(digest_size=16)
    whole = (folder / _TOKENIZER).is_file()  # then the files of slower tokenizers are not read
    for name in (_TOKENIZER,) if whole else _TOKENIZER_PARTS:
        if (folder / name).is_file():
            digest.update(f"{name}:{_digest(folder / name)};".encode())
    if (folder / _TOKENIZER_CONFIG).is_file():
        digest.update(_canonical(_read(folder / _TOKENIZER_CONFIG), _HARMLESS_TO_TOKENS).encode())
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """The weight files that vLLM would load: safetensors before other formats, and where an index names some of them,
    only those. Raises `ModelError`."""
    consolidated = sorted(folder.glob(_CONSOLIDATED))
    found = consolidated or sorted(folder.glob(_SAFETENSORS))
    if found:
        index = folder / f"{'consolidated' if consolidated else 'model'}.safetensors.index.json"
        return _named_by(index, found) if index.is_file() else found
    for pattern in _OTHER_WEIGHTS:
        found = sorted(path for path in folder.glob(pattern) if not path.name.endswith(_NO_WEIGHTS))
        if found:
            return found
    return []


def _named_by(index: Path, found: list[Path]) -> list[Path]:
    weights = _read(index).get("weight_map")
    names = set(weights.values()) if isinstance(weights, dict) else set()
    missing = names - {path.name for path in found}
    if missing or not names:
        raise ModelError(
            f"{index} names weight files that are not there ({', '.join(sorted(map(str, missing))) or 'none at all'}): "
            "complete the folder, or delete the index where the weights lie in one file."
        )
    return [path for path in found if path.name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): fetch the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is no JSON object: fetch the model again.")
    return content


def _canonical(value: Any, harmless: frozenset[str]) -> str:
    """The same text for all ways to write the same settings."""
    return json.dumps(_settings(value, harmless), sort_keys=True, separators=(",", ":"))


def _settings(value: Any, harmless: frozenset[str]) -> Any:
    if isinstance(value, list):
        return [_settings(each, harmless) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, dict):
        return value
    kept = {name: _settings(each, harmless) for name, each in value.items() if name not in harmless}
    dtype = kept.pop("torch_dtype", None)  # its older name
    if dtype is not None or "dtype" in kept:
        kept["dtype"] = str(kept.get("dtype") or dtype).removeprefix("torch.")
    return kept


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
