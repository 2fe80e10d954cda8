"""Learning as settings have it, each with an engine of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmcache_rag.engine import LocalEngine
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions
from tests.helpers import OFF, answer, connector, noise
from tests.vllm.apps import App, ask, settings_in


def test_off_means_that_nothing_is_stored(no_engine: None, tmp_path: Path) -> None:
    app = App(311)
    with LocalEngine(settings_in(tmp_path, learn="off")) as engine:
        for number in (0, 1, 2):
            assert ask(engine, app.prompt(number)).reuse.mode == "plain"
            engine.settle()
        assert not connector(engine).has_pending_push_work()
    assert not list((tmp_path / "kv").glob("*.learned*"))


def test_without_codec_tables_and_prefix_cache(
    no_engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has to be learned of the model first; after a restart all is there, and is repaired like any chunk."""
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path / "cache"))
    app = App(312)
    settings = settings_in(tmp_path, codec="balanced", prefix_caching=False, never_slower=False)
    with LocalEngine(settings) as engine:
        for number in (0, 1):
            ask(engine, app.prompt(number), "own")
            engine.settle()
    with LocalEngine(settings) as engine:
        plan = MarkedPrompt(tuple(app.prompt(2)), len(app.preamble), ())
        found, done = answer(engine, plan, BlendOptions(ratio=1.0), "own")
        assert done.reuse.recomputed_tokens == app.context_tokens
        assert done.reuse.learned_tokens == app.context_tokens + len(app.preamble)  # the preamble is exact
        assert done.reuse.codecs["q8"] == app.context_tokens and done.reuse.foreign_tokens == 0
        expected, _ = answer(engine, plan, OFF)
        torch.testing.assert_close(found, expected, atol=20 * noise(engine, plan), rtol=0)
