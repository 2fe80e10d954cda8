"""The documentation names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from lmcache_rag.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("integrations/*/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)", page.read_text())
    gone = [link for link, _ in links if not (page.parent / link).exists()]
    assert not gone


def test_limits_are_held_by_tests() -> None:
    named = re.findall(r"`((?:vllm|engine|integrations|kernels)/[\w./]*)`", (ROOT / "docs" / "limits.md").read_text())
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / "tests" / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    for line in re.findall(r"(?:^\s*|; )(lmcache-rag [^#;\n]*)", page.read_text().replace("\\\n", " "), re.MULTILINE):
        command, words = get_command(app), line.split()[1:]
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if command.name == "serve" and "bench" not in line:
            continue  # takes vLLM's options too
        known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        assert not {word.partition("=")[0] for word in words if word.startswith("--")} - known - {"--help"}, line
