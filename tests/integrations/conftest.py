"""What the tests of both integrations share."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import pytest

from lmcache_rag.engine import LocalEngine

FOLDER = Path(__file__).parent
HERMES = FOLDER / "hermes.jinja"
CORPUS = FOLDER.parents[1] / "examples" / "corpus"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs the conformance suite's asynchronous tests, which carry no mark that a plugin would go by."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True


@pytest.fixture
def corpus_texts() -> dict[str, str]:
    """The beginnings of two documents: file name -> text."""
    names = ("06-wind-and-rain.md", "08-power-and-battery.md")
    return {name: (CORPUS / name).read_text()[:1600] for name in names}


@pytest.fixture
def question() -> str:
    """A question that one of the documents answers."""
    return "How long does the main battery run the station without sunlight?"


@pytest.fixture
def calling(smollm: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> LocalEngine:
    """SmolLM2 with a chat template that tells it of tools, in the form of the Hermes models. It was not trained to
    call them: tests force calls, or have a grammar write what a model that chooses to call would."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm.model_folder)
    tokenizer.chat_template = HERMES.read_text()
    monkeypatch.setattr(smollm, "_tokenizer", tokenizer)
    monkeypatch.setattr(smollm, "_tool_parser", "hermes")
    return smollm
