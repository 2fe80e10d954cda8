"""What all commands share: where and how they print, the options that most of them take, and which were given.

Users' text reaches the terminal as it is: in rich's markup, `[/INST]` in a passage would be an error and `[red]` would
vanish. So consoles, notes and progress bars are those of this module, which take styles and never read text for them.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from lmcache_rag.request import SelectorName

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, which could do anything to a terminal, and halves of surrogate pairs, which have no encoding."""


def printable(text: str) -> str:
    """The text with what cannot be printed written as an escape (backslash, `x1b`)."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PlainConsole(Console):
    """A console to which text is text."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`."""
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)

    def problem(self, label: str, text: str) -> None:
        """A line that begins with `label` in red."""
        self.print(Text.assemble((label, "bold red"), f" {printable(text)}"), soft_wrap=True)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A note with a spinner, while the context lasts."""
        return _PlainStatus(_as_text(status), console=self, **options)

    def progress(self) -> Progress:
        """Progress bars."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        return Progress(*columns, TimeRemainingColumn(), console=self)


class _PlainStatus(Status):
    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(None if status is None else _as_text(status), **options)


def _as_text(note: RenderableType) -> RenderableType:
    return Text(printable(note)) if isinstance(note, str) else note


out = PlainConsole()
err = PlainConsole(stderr=True)


def encode_anything() -> None:
    """Have standard output write what its encoding lacks as an escape, as standard error does, and not fail."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print figures as a table: a line per row where the terminal is wide enough, else a line per field; in a file or a
    pipe a line per row however long. A figure that has parts takes a field for each; fields without any value are left
    out."""
    flat = [_flat(row) for row in rows]
    fields = [name for name in dict.fromkeys(itertools.chain(*flat)) if any(row.get(name) for row in flat)]
    lines = [fields, *([row.get(name, "") for name in fields] for row in flat)]
    upright, turned = _table(lines), _table([list(line) for line in zip(*lines, strict=True)])
    width = _width(upright)
    if not out.is_terminal:
        PlainConsole(width=width).print(upright)
    else:
        out.print(upright if width <= out.width or width < _width(turned) else turned)


def _width(table: Table) -> int:
    """How many columns of the terminal it takes where nothing is folded."""
    return Measurement.get(out, out.options.update(max_width=10_000), table).maximum


def _flat(row: Mapping[str, Any]) -> dict[str, str]:
    """Field -> text; `{"phases_ms": {"load": 3}}` is `phases ms: load` -> `3`."""
    flat: dict[str, str] = {}
    for name, value in row.items():
        label = name.replace("_", " ")
        if isinstance(value, Mapping):
            flat |= {f"{label}: {part}": str(each) for part, each in value.items()}
        elif isinstance(value, list | tuple):
            flat[label] = " to ".join(map(str, value))
        else:
            flat[label] = "" if value is None else str(value)
    return flat


def _table(lines: Sequence[Sequence[str]]) -> Table:
    """The first line is the heading."""
    table = Table(*map(printable, lines[0]), box=SIMPLE_HEAD)
    for line in lines[1:]:
        table.add_row(*map(printable, line))
    for column in table.columns:
        column.overflow = "fold"
    return table


DEFAULT_INDEX = Path(".lmcache-rag")
IndexOption = Annotated[Path, typer.Option("--index", help="Folder of the index.")]
ServerOption = Annotated[
    Optional[str],
    typer.Option(envvar="LMCACHE_RAG_BASE_URL", help="Ask a running server (`serve --index`), and start no engine."),
]
PassagesOption = Annotated[int, typer.Option("--passages", "-k", min=1, help="How many passages to answer from.")]
SelectorOption = Annotated[str, typer.Option(help=f"Which tokens to recompute: {', '.join(get_args(SelectorName))}.")]
TargetKLOption = Annotated[
    float, typer.Option(help="How far from full prefill answers may be: mean KL divergence, as calibrated.")
]
RatioOption = Annotated[
    Optional[float], typer.Option(help="Share of the passages' tokens to recompute, 0 to 1, instead of a target.")
]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer.")]
TiersOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--tier",
        help="Folder or URI of a cache in front of the store, as file:///var/cache/kv?capacity=100GiB; repeat it for "
        "several, fastest first.",
    ),
]
ThreadsOption = Annotated[Optional[int], typer.Option(help="CPU threads; all cores by default.")]
ModelOption = Annotated[
    Optional[str], typer.Option(help="Hugging Face id or folder; SmolLM2-135M-Instruct by default.")
]
DtypeOption = Annotated[Optional[str], typer.Option(help="Compute type: auto, float32, bfloat16, float16.")]
CodecOption = Annotated[
    Optional[str], typer.Option(help="How KV is stored: raw, q8, high, balanced (default), small, q4 or cachegen.")
]
CapacityOption = Annotated[
    Optional[str],
    typer.Option(help="Most that the namespace stores, such as 10GiB; what is used least goes."),
]


def given(**values: Any) -> dict[str, Any]:
    """The options that were given; the environment and the defaults decide the others."""
    return {name: value for name, value in values.items() if value is not None}
