"""Codec tables that come with the package: those of the default model, so that its first index learns none.

make tables
"""

from __future__ import annotations

from pathlib import Path

from lmcache_rag.codec.tables import CodecTables
from lmcache_rag.model import is_default_model

SHIPPED = Path(__file__).with_name("default_model.safetensors")


def shipped_tables(model_folder: Path) -> CodecTables | None:
    """The tables of the model in a folder; None where it is not the default model as this package prepares it.

    They are told by the file that the weights come from, not by the model's fingerprint, which holds its compute type
    and the form of its config too: what tables are learned of decides how small KV gets, not whether it is right.
    """
    return CodecTables.from_bytes(SHIPPED.read_bytes()) if is_default_model(model_folder) else None
