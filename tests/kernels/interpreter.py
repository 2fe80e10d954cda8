"""Triton's kernels under its interpreter, since there may be no GPU.

Triton decides when it is imported whether it interprets, so such tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_under_the_interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="this is that process")


def run_interpreted(file: str) -> None:
    """Run a file's tests in such a process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
