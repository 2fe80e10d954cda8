"""What vLLM is started with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lmcache_rag.engine import EngineSettings
from lmcache_rag.engine.start import engine_arguments
from tests.models import make_tiny

_BESIDE_NUMBA = """
import sys
from pathlib import Path

import numba

from lmcache_rag.engine import EngineSettings, LocalEngine, Sampling

folder = Path(sys.argv[1])
with LocalEngine(EngineSettings(model=folder / "tiny", store=folder / "kv", kv_cache_bytes=64 << 20)) as engine:
    print(len(engine.generate([7, 8, 9], Sampling(max_tokens=3, ignore_eos=True)).token_ids))
"""


def test_compiled_models_keep_fused_operators_for_what_runs_uncompiled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    on_gpu = engine_arguments(EngineSettings(), tmp_path, {}, on_cpu=False)
    assert on_gpu["compilation_config"] == {"custom_ops": ["all"]} and on_gpu["enforce_eager"] is False
    on_cpu = engine_arguments(EngineSettings(), tmp_path, {}, on_cpu=True)
    assert "compilation_config" not in on_cpu and on_cpu["enforce_eager"] is True


def test_beside_numba(tmp_path: Path) -> None:
    """A process that has imported numba, which llvmlite's library makes hard for vLLM."""
    make_tiny("llama", tmp_path / "tiny")
    command = [sys.executable, "-c", _BESIDE_NUMBA, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "3"
