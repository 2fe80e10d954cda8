"""What is printed: users' text as it is, whatever is in it, and figures that can be read."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lmcache_rag
from lmcache_rag.terminal import PlainConsole, encode_anything, err, out, printable, show_rows

HOSTILE = "[/INST] [link](url) [red]x[/red] [bold :smile: \\[ end"


def use_progress(console: PlainConsole, text: str) -> None:
    with console.progress() as progress:
        progress.update(progress.add_task(text, total=1), description=text, completed=1)


def use_status(console: PlainConsole, text: str) -> None:
    with console.status(text) as status:
        console.print(status.renderable.text)
        status.update(text)
        console.print(status.renderable.text)


@pytest.mark.parametrize(
    "use",
    [
        lambda console, text: console.print(text),
        lambda console, text: console.print(text, style="dim"),
        lambda console, text: console.problem("error:", text),
        use_progress,
        use_status,
    ],
    ids=["text", "styled", "problem", "progress", "status"],
)
def test_text_is_never_markup(use: Callable[[PlainConsole, str], None], capsys: pytest.CaptureFixture[str]) -> None:
    use(PlainConsole(), HOSTILE)
    assert HOSTILE in capsys.readouterr().out


def test_all_consoles_are_plain() -> None:
    """Whoever makes another one brings the fault back."""
    assert isinstance(out, PlainConsole) and isinstance(err, PlainConsole)
    root = Path(lmcache_rag.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "examples").glob("*.py")]
    rich = [path.name for path in files if re.search(r"^\s*(from|import) rich\b", path.read_text(), re.MULTILINE)]
    assert rich == ["terminal.py"]


def test_control_characters_and_half_surrogates_are_shown_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2J\x07b\udcffc\td\né\x85") == "a\\x1b[2J\\x07b\\udcffc\td\né\\x85"
    out.print("a\x1b[2J\udcff")
    assert capsys.readouterr().out == "a\\x1b[2J\\udcff\n"


def test_what_an_encoding_lacks_is_shown_as_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    encode_anything()
    out.print("é")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\n"  # type: ignore[attr-defined]


ROWS = [
    {"mode": "full", "ratio": 1.0, "selector": "", "phases_ms": {}, "ci95": [0.1, 0.25], "goal": None},
    {"mode": "blend", "ratio": 0.0, "selector": "", "phases_ms": {"load": 3, "write": 14}, "ci95": [0.2, 0.3]},
]


@pytest.mark.parametrize(("width", "is_terminal"), [(100, True), (50, True), (50, False)])
def test_figures_with_parts_take_a_field_for_each(
    width: int, is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file a line per row is never folded."""
    monkeypatch.setattr(out, "_width", width)
    monkeypatch.setattr(PlainConsole, "is_terminal", property(lambda _: is_terminal))
    show_rows(ROWS)
    shown = capsys.readouterr().out
    assert not set("{}[]'") & set(shown)
    lines = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines() if re.search(r"\w", line)]
    upright = [
        ["mode", "ratio", "ci95", "phases ms: load", "phases ms: write"],
        ["full", "1.0", "0.1 to 0.25"],
        ["blend", "0.0", "0.2 to 0.3", "3", "14"],
    ]
    turned = [
        ["mode", "full", "blend"],
        ["ratio", "1.0", "0.0"],
        ["ci95", "0.1 to 0.25", "0.2 to 0.3"],
        ["phases ms: load", "3"],
        ["phases ms: write", "14"],
    ]
    assert lines == (upright if width == 100 or not is_terminal else turned)
