"""The check of vLLM's private interfaces: passes on the installed vLLM, and fails when something is gone or changed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from lmcache_rag.vllm import check


def test_the_installed_vllm_is_as_expected() -> None:
    assert check.problems(check.installed_source()) == []


@pytest.mark.parametrize(
    ("path", "old", "new", "problem"),
    [
        ("forward_context.py", "skip_compiled: bool", "skips: bool", "ForwardContext has no skip_compiled"),
        ("forward_context.py", "def override_forward_context", "def other", "override_forward_context is gone"),
        (
            "v1/attention/backends/flash_attn.py",
            "slot_mapping: torch.Tensor,\n    ) -> None:",
            "slots: torch.Tensor,\n    ) -> None:",
            "do_kv_cache_update has parameters",
        ),
        (
            "distributed/kv_transfer/kv_connector/v1/base.py",
            "def on_new_request(self, request:",
            "def on_new_request(self, step, request:",
            "new required parameters (step)",
        ),
        (
            "v1/core/sched/scheduler.py",
            "self.connector.on_new_request(request)",
            "pass",
            "does not contain `self.connector.on_new_request(request)`",
        ),
        ("v1/request.py", "update_block_hashes", "renew_block_hashes", "Request has no update_block_hashes"),
    ],
)
def test_what_is_gone_or_changed_is_named(path: str, old: str, new: str, problem: str) -> None:
    real = check.installed_source()

    def changed(name: str) -> str | None:
        text = real(name)
        if name == path:
            assert text is not None and old in text
            return text.replace(old, new)
        return text

    found = check.problems(changed)
    assert any(problem in line for line in found), found


def test_a_missing_file_and_a_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "vllm-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/forward_context.py", "def override_forward_context(forward_context): ...")
    assert check.main([str(wheel)]) == 1
    printed = capsys.readouterr().out
    assert "1 of" in printed and "ForwardContext is gone" in printed
    assert check.main([]) == 0
