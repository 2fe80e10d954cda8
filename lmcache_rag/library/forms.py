"""In which forms a chunk's variants can be read, by what is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lmcache_rag.chunk_kv import base_of, codec_in, variant_in
from lmcache_rag.codec import CODECS
from lmcache_rag.records.part import VariantRow


def readable(recorded: Mapping[str, VariantRow]) -> dict[str, dict[str, VariantRow]]:
    """By variant and codec the form to read, with the bytes of all that is read for it. What is there whole is not read
    as a residual, and what is missing its base not at all."""
    found: dict[str, dict[str, VariantRow]] = {}
    for form, row in recorded.items():
        codec, base = codec_in(form), base_of(form)
        if codec not in CODECS or (base and base not in recorded):
            continue
        if base:
            row = replace(row, size_bytes=row.size_bytes + recorded[base].size_bytes)  # noqa: PLW2901
        forms = found.setdefault(variant_in(form), {})
        if not base or codec not in forms:
            forms[codec] = row
    return found


def base_for(variant: str, codec: str, recorded: Mapping[str, VariantRow]) -> str:
    """The form that a variant is stored as a residual against: the same chunk behind the same preamble and a primer,
    in the same codec, the one last used; empty where it is stored whole."""
    if CODECS[codec].residual is None:
        return ""
    primed = [
        row
        for form, row in recorded.items()
        if form.startswith(f"{variant}-") and codec_in(form) == codec and not base_of(form)
    ]
    return max(primed, key=lambda row: row.used_s).form if primed else ""


def read_for(form: str) -> list[str]:
    """The forms that are read for one: itself, and what it is a residual against."""
    return [form, base] if (base := base_of(form)) else [form]
