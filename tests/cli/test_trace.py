"""The page of `ask --trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.cli.trace import write_trace
from lmcache_rag.engine import Completion
from lmcache_rag.errors import LmcacheRagError, PromptError
from lmcache_rag.request import ReuseReport


class Words:
    def decode(self, token_ids: Any) -> str:
        return "".join(f"<{number}>" for number in token_ids)


def answer(**report: Any) -> Completion:
    reuse = ReuseReport(prompt_tokens=6, **report)
    return Completion("It & that.", (), "stop", reuse, 0.5, 1.0, 6, 3)


def test_each_token_is_shown_as_what_it_is(tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    runs = (("local", 1), ("carried", 2), ("recomputed", 1), ("vllm", 2))
    write_trace(page, Words(), list(range(6)), answer(mode="blend", trace=runs))  # type: ignore[arg-type]
    text = page.read_text()
    assert '<span class="carried" title="carried, 2 tokens">&lt;1&gt;&lt;2&gt;</span>' in text
    assert '<span class="vllm" title="vllm, 2 tokens">&lt;4&gt;&lt;5&gt;</span>' in text
    assert "<b>1</b> recomputed" in text and "missed</span>" not in text and "It &amp; that." in text


def test_a_prompt_that_was_not_blended(tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    report = answer(mode="plain", reason="nothing is stored", local_tokens=2)
    write_trace(page, Words(), list(range(6)), report)  # type: ignore[arg-type]
    text = page.read_text()
    assert "<b>2</b> local" in text and "<b>4</b> vllm" in text and "plain, nothing is stored" in text
    with pytest.raises(LmcacheRagError, match="cannot be written"):
        write_trace(tmp_path / "no" / "trace.html", Words(), [], report)  # type: ignore[arg-type]


def test_a_server_tells_nothing_of_tokens(tmp_path: Path) -> None:
    asked = ["ask", "What?", "--server", "http://127.0.0.1:1", "--trace", str(tmp_path / "trace.html")]
    with pytest.raises(PromptError, match="--trace: a server"):
        CliRunner().invoke(app, asked, catch_exceptions=False)
