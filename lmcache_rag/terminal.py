"""What all commands share: where they print, the options that most of them take, and which of those were given."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

ThreadsOption = Annotated[Optional[int], typer.Option(help="CPU threads; all cores by default.")]
ModelOption = Annotated[
    Optional[str], typer.Option(help="Hugging Face id or folder; SmolLM2-135M-Instruct by default.")
]
DtypeOption = Annotated[Optional[str], typer.Option(help="Compute type: auto, float32, bfloat16, float16.")]
CodecOption = Annotated[
    Optional[str], typer.Option(help="How KV is stored: raw, q8, high, balanced (default), small, q4 or cachegen.")
]


def given(**values: Any) -> dict[str, Any]:
    """The options that were given; the environment and the defaults decide the others."""
    return {name: value for name, value in values.items() if value is not None}
