"""A model's chat template, read from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def chat_template(folder: Path) -> Any:
    """The text of the model's chat template, or several by name; None where it has none, or its files are no text."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("chat_template")
    return {each["name"]: each["template"] for each in found} if isinstance(found, list) else found
