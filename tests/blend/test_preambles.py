"""Preambles in memory: bounded, and those used last stay."""

from __future__ import annotations

import torch

from lmcache_rag.blend import LayerSpec, Workspace
from lmcache_rag.blend.preambles import Preambles

BYTES_PER_TOKEN = 2 * 2 * 8 * 4


def workspace_of(value: float) -> Workspace:
    workspace = Workspace([LayerSpec(scale=1.0)] * 2, kv_heads=1, head_size=8, max_tokens=32, dtype=torch.float32)
    workspace.key[:], workspace.value[:] = value, -value
    return workspace


def test_what_was_used_longest_ago_makes_room() -> None:
    preambles = Preambles(20 * BYTES_PER_TOKEN)
    first, second, third = range(10), range(10, 20), range(20, 25)
    for number, token_ids in enumerate((first, second), start=1):
        preambles.keep(workspace_of(number), "a", token_ids)
    assert preambles.place(workspace_of(0), "a", first)
    preambles.keep(workspace_of(3), "a", third)
    found = workspace_of(0)
    assert not preambles.place(found, "a", second)
    assert not found.key.any()
    assert preambles.place(found, "a", first) and preambles.place(workspace_of(0), "a", third)
    assert bool((found.key[:, :10] == 1).all()) and bool((found.value[:, :10] == -1).all())
    assert not found.key[:, 10:].any()


def test_what_is_too_long_is_not_kept_and_drives_out_nothing() -> None:
    preambles = Preambles(20 * BYTES_PER_TOKEN)
    preambles.keep(workspace_of(1), "a", range(20))
    preambles.keep(workspace_of(2), "a", range(21))
    preambles.keep(workspace_of(2), "a", [])
    assert preambles.place(workspace_of(0), "a", range(20))
    assert not preambles.place(workspace_of(0), "a", range(21))
    assert not preambles.place(workspace_of(0), "a", [])


def test_what_may_be_one_prompts_own_is_kept_when_it_comes_again() -> None:
    preambles = Preambles()
    for expected in (False, True):
        preambles.keep(workspace_of(1), "a", range(10), is_preamble=False)
        preambles.keep(workspace_of(1), "b", range(10 + expected), is_preamble=False)
        assert preambles.place(workspace_of(0), "a", range(10)) == expected
        assert not preambles.place(workspace_of(0), "b", range(10))


def test_neither_another_namespace_nor_a_beginning_is_the_same() -> None:
    preambles = Preambles()
    preambles.keep(workspace_of(1), "a", range(10))
    assert not preambles.place(workspace_of(0), "b", range(10))
    assert not preambles.place(workspace_of(0), "a", range(9))
