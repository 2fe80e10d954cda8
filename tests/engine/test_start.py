"""What vLLM is started with."""

from __future__ import annotations

from pathlib import Path

from lmcache_rag.engine import EngineSettings
from lmcache_rag.engine.start import engine_arguments


def test_compiled_models_keep_fused_operators_for_what_runs_uncompiled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    on_gpu = engine_arguments(EngineSettings(), tmp_path, {}, on_cpu=False)
    assert on_gpu["compilation_config"] == {"custom_ops": ["all"]} and on_gpu["enforce_eager"] is False
    on_cpu = engine_arguments(EngineSettings(), tmp_path, {}, on_cpu=True)
    assert "compilation_config" not in on_cpu and on_cpu["enforce_eager"] is True
