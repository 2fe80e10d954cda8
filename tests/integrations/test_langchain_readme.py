"""The quickstart in the package's README, as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("langchain_core")

ROOT = Path(__file__).parents[2]
README = ROOT / "integrations" / "langchain-lmcache-rag" / "README.md"


def test_the_quickstart_reuses_its_context(no_engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 15
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LMCACHE_RAG_STORE", str(tmp_path))
    monkeypatch.setenv("LMCACHE_RAG_KV_CACHE_BYTES", str(512 << 20))
    names: dict[str, object] = {}
    try:
        exec(compile(code, str(README), "exec"), names)
        llm, answer, found, question = (names[name] for name in ("llm", "answer", "found", "question"))
        context = len(llm.engine.tokenizer.encode(found.invoke(question), add_special_tokens=False))
        reuse = answer.response_metadata["reuse"]
        assert answer.text.strip()
        from_store = reuse["reused_tokens"] + reuse["recomputed_tokens"] + reuse["local_tokens"]  # a share is repaired
        assert from_store >= 0.9 * context, reuse
        assert reuse["reused_tokens"] >= 0.8 * context, reuse
        assert reuse["foreign_tokens"] == 0
    finally:
        if "llm" in names:
            names["llm"].engine.close()
