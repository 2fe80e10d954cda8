"""The examples, as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.engine import RemoteEngine, precompute_texts
from tests.servers import RagServer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a script prints."""
    script: dict[str, Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    script["main"](*arguments)
    return capsys.readouterr().out


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("name", ["llama_index_chat", "langchain_lcel"])
def test_frameworks(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the store is made
    out = run(name, capsys)
    known = [(int(known), int(tokens)) for known, tokens in re.findall(r"(\d+) of (\d+) prompt tokens were known", out)]
    assert len(known) >= 2
    assert all(known > 0.6 * tokens for known, tokens in known), out


@pytest.mark.usefixtures("no_engine")
def test_the_notebook(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXAMPLES / "corpus", tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)  # a notebook runs in its own folder
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    run_in: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), run_in)
    rows = re.findall(r"(blend|off) +([0-9.]+)s +(\d+) +(\d+) +(\d+)", capsys.readouterr().out)
    assert [mode for mode, *_ in rows] == ["blend", "off"] * 3
    for mode, ttft_s, reused, repaired, prompt in rows:
        assert float(ttft_s) > 0
        assert (int(reused) + int(repaired) > 0.6 * int(prompt)) == (mode == "blend")


@pytest.mark.usefixtures("no_engine")
def test_an_agent(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langgraph", reason="needs LangGraph")
    monkeypatch.chdir(tmp_path)
    out = run("langgraph_agent", capsys)
    assert "look_up" in out
    assert "Tool Message" in out
    assert out.count("Ai Message") == 2


def test_an_openai_client(smollm_server: RagServer, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [(EXAMPLES / "corpus" / name).read_text() for name in ("09-radio-and-network.md", "03-unpacking.md")]
    engine = RemoteEngine(smollm_server.url)
    precompute_texts(engine, engine.tokenizer.encode("Passages:\n\n"), texts).check()
    found = re.search(
        r"(\d+) prompt tokens: (\d+) reused, (\d+) recomputed", run("openai_client", capsys, f"{smollm_server.url}/v1")
    )
    assert found is not None
    prompt_tokens, reused, recomputed = map(int, found.groups())
    assert reused + recomputed > 0.9 * prompt_tokens


def test_two_servers_on_one_store(smollm_server: RagServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    second = RagServer.beside(smollm_server, tmp_path / "log")
    try:
        second.wait()
        out = run("two_servers", capsys, smollm_server.url, second.url)
    finally:
        second.kill()
    reused = [int(count) for count in re.findall(r"(\d+) of \d+ tokens reused", out)]
    assert len(reused) == 2
    assert min(reused) > 500


@pytest.mark.usefixtures("no_engine")
def test_the_check_of_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = "--layers 3 --hidden 128 --heads 4 --kv-heads 2 --chunks 3x100 --repeats 1"
    for name in ("LMCACHE_RAG_NEVER_SLOWER", "LMCACHE_RAG_REFINE", "LMCACHE_RAG_LEARN"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the script sets them: as they were, afterwards
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *shape.split()])
    out = run("gpu_check", capsys)
    kinds = re.findall(r"^(.+?) +[0-9.]+ ms +[0-9.]+x  (off|blend)", out, re.MULTILINE)
    assert [mode for _, mode in kinds] == ["off"] + ["blend"] * 4
    distance = re.search(r"KL to full prefill (\S+)", out)
    assert distance is not None and float(distance[1]) < 1e-4
