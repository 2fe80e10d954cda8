"""Applications of the frameworks: both ways of asking are counted, and what is reused is."""

from __future__ import annotations

import pytest

from lmcache_rag.bench.frameworks import bench_frameworks
from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import EngineError

pytest.importorskip("langchain_lmcache_rag")
pytest.importorskip("llama_index.llms.lmcache_rag")

from lmcache_rag.bench.framework_apps import apps


def rows(engine: LocalEngine, named: str) -> list[dict[str, object]]:
    return bench_frameworks(engine, chunk_tokens=100, questions=1, named=named, progress=lambda _: None)


@pytest.mark.parametrize("named", ["langchain prompt template", "llama_index compact (chat template)"])
def test_an_applications_passages_are_found(smollm: LocalEngine, named: str) -> None:
    row = rows(smollm, named)[0]
    assert f"{row['framework']} {row['app']}" == named
    assert (row["calls"], row["foreign_share"]) == (1.0, 0.0)
    assert float(str(row["reused_share"])) > 0.7 and float(str(row["speedup"])) > 0


def test_a_model_without_a_chat_template_is_asked_without_one(llama: LocalEngine) -> None:
    assert not [app.name for app in apps(llama, 2) if "chat template" in app.name]


def test_no_such_application(llama: LocalEngine) -> None:
    with pytest.raises(EngineError, match="'Haystack'"):
        rows(llama, "Haystack")
