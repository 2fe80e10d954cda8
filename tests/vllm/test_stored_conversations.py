"""Conversations outlive engines: their exact KV is in the store, and another engine computes only the new turn."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache_rag.conversation.prefixes import PIECE_TOKENS, pieces, stored_pieces
from lmcache_rag.engine import EngineSettings, LocalEngine, Sampling
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.names import chats_of
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import BlendOptions
from tests.helpers import OFF, answer, fix_rates, ingest, noise, parts, random_plan
from tests.models import make_tiny

REPAIR = BlendOptions(ratio=0.2)
FOLLOWING = tuple(range(50, 150))


def settings_in(folder: Path, conversations: str = "stored") -> EngineSettings:
    return EngineSettings(
        model=str(make_tiny("llama", folder / "tiny")),
        store=folder / "kv",
        codec="raw",
        dtype="float32",
        kv_cache_bytes=64 << 20,
        primed=False,
        never_slower=True,
        refine="idle",
        conversations=conversations,
    )


def turn_of(engine: LocalEngine, plan: MarkedPrompt, salt: str = "own") -> MarkedPrompt:
    """Ask the prompt, have what follows while nothing is asked done, and give the next turn's prompt."""
    done = engine.generate(plan, Sampling(max_tokens=40, ignore_eos=True), REPAIR, cache_salt=salt)
    engine.settle()
    return MarkedPrompt((*plan.token_ids, *done.token_ids, *FOLLOWING), plan.preamble_length, ())


def test_another_engine_goes_on_from_the_store(no_engine: None, tmp_path: Path) -> None:
    plan = random_plan(230, chunks=(200, 200, 200))
    settings = settings_in(tmp_path)
    with LocalEngine(settings) as engine:
        fix_rates(engine)
        ingest(engine, plan)
        turn = turn_of(engine, plan)
    known = len(plan.token_ids) + 40
    with LocalEngine(settings) as engine:
        fix_rates(engine)
        tolerance = 20 * noise(engine, plan)
        expected, _ = answer(engine, turn, OFF)
        found, done = answer(engine, turn, REPAIR, "own")
        assert done.reuse.mode == "prefix" and done.reuse.recomputed_tokens == done.reuse.missed_tokens == 0
        assert known - PIECE_TOKENS - 32 < done.reuse.exact_tokens == done.reuse.reused_tokens <= known
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        _, exact = answer(engine, turn, OFF, "own")  # it is exact, so others may have it
        assert exact.reuse.local_tokens >= done.reuse.reused_tokens // 32 * 32
        _, other = answer(engine, turn, REPAIR, "another")
        assert other.reuse.mode != "prefix"
        _, other = answer(engine, turn, REPAIR.model_copy(update={"namespace": "other"}), "own2")
        assert other.reuse.mode != "prefix"
        engine.settle()
        following = turn_of(engine, turn)  # made from what is stored, with the new turn computed
    with LocalEngine(settings) as engine:
        fix_rates(engine)
        expected, _ = answer(engine, following, OFF)
        found, done = answer(engine, following, REPAIR, "own")
        assert done.reuse.mode == "prefix" and done.reuse.reused_tokens > known + PIECE_TOKENS
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        cut = known - 30
        edited = MarkedPrompt((*turn.token_ids[:cut], *range(200, 300)), plan.preamble_length, ())
        expected, _ = answer(engine, edited, OFF)
        assert engine._loop.engine.reset_prefix_cache()
        found, done = answer(engine, edited, REPAIR, "own")
        assert done.reuse.mode == "prefix" and done.reuse.reused_tokens == cut // PIECE_TOKENS * PIECE_TOKENS
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_a_damaged_piece_is_computed(no_engine: None, tmp_path: Path) -> None:
    plan = random_plan(231, chunks=(200, 200, 200))
    settings = settings_in(tmp_path)
    with LocalEngine(settings) as engine:
        fix_rates(engine)
        tolerance = 20 * noise(engine, plan)
        ingest(engine, plan)
        turn = turn_of(engine, plan)
        chunks = engine.chunk_store(chats_of(settings.namespace, "own"))
        found = stored_pieces(chunks, turn.token_ids)
        assert len(found) >= 9
        path = tmp_path / "kv" / found[4][1].name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        expected, _ = answer(engine, turn, OFF)
        assert engine._loop.engine.reset_prefix_cache()
        answered, done = answer(engine, turn, REPAIR, "own")
        assert done.reuse.mode == "prefix" and done.reuse.misses == {"corrupt": PIECE_TOKENS}
        torch.testing.assert_close(answered, expected, atol=tolerance, rtol=0)


def test_history_behind_new_passages_is_reused_and_repaired(no_engine: None, tmp_path: Path) -> None:
    first, second = random_plan(233, chunks=(200, 150)), random_plan(234, chunks=(170, 190, 60))
    preamble, passages, _ = parts(first)
    _, others, _ = parts(second)
    settings = settings_in(tmp_path)
    with LocalEngine(settings) as engine:
        fix_rates(engine)
        tolerance = 20 * noise(engine, first)
        assert not engine.precompute(preamble, [*passages, *others]).errors
        said = list(random_plan(235, chunks=(), rest=230).token_ids)
        turn_of(engine, MarkedPrompt.assemble(preamble, passages, said))
        turn = MarkedPrompt.assemble(preamble, others, [*said, *FOLLOWING])
        _, done = answer(engine, turn, REPAIR, "own")
        assert done.reuse.mode == "blend" and done.reuse.foreign_tokens == 0
        known = sum(map(len, others)) + len(said)
        assert known - 2 * PIECE_TOKENS < done.reuse.reused_tokens + done.reuse.recomputed_tokens < known + 100
        _, other = answer(engine, turn, REPAIR, "another")
        assert other.reuse.reused_tokens + other.reuse.recomputed_tokens <= len(preamble) + sum(map(len, others))
        exact, done = answer(engine, turn, BlendOptions(ratio=1.0), "own")
        expected, _ = answer(engine, turn, OFF)
        torch.testing.assert_close(exact, expected, atol=tolerance, rtol=0)


def test_new_passages_behind_an_exact_conversation_are_blended(no_engine: None, tmp_path: Path) -> None:
    first, second = random_plan(236, chunks=(150, 150)), random_plan(237, chunks=(170, 190))
    preamble, passages, _ = parts(first)
    _, others, _ = parts(second)
    settings = settings_in(tmp_path)
    with LocalEngine(settings) as engine:
        fix_rates(engine)
        tolerance = 20 * noise(engine, first)
        assert not engine.precompute(preamble, [*passages, *others]).errors
        turn = turn_of(engine, first)
        prompt = [*turn.token_ids, *(token for passage in others for token in passage), *FOLLOWING]
        begun = len(turn.token_ids) - len(FOLLOWING)
        _, done = answer(engine, MarkedPrompt(tuple(prompt), len(preamble), ()), REPAIR, "own")
        assert done.reuse.mode == "blend" and done.reuse.foreign_tokens == 0
        assert done.reuse.local_tokens > begun - 64  # what is in the prefix cache is not written again
        assert done.reuse.reused_tokens + done.reuse.recomputed_tokens > sum(map(len, others)) - 10
        assert done.reuse.unknown_tokens <= len(FOLLOWING) + PIECE_TOKENS
        expected, _ = answer(engine, MarkedPrompt(tuple(prompt), len(preamble), ()), OFF)
    with LocalEngine(settings.model_copy(update={"never_slower": False})) as engine:
        options = BlendOptions(ratio=1.0)
        exact, done = answer(engine, MarkedPrompt(tuple(prompt), len(preamble), ()), options, "own")
        assert done.reuse.mode == "blend" and done.reuse.exact_tokens > begun - PIECE_TOKENS
        torch.testing.assert_close(exact, expected, atol=tolerance, rtol=0)


def test_no_request_waits_for_a_conversation_to_be_stored(
    no_engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, begun, released, gave_up = ChunkStore.save, threading.Event(), threading.Event(), []

    def hanging(chunks: ChunkStore, *arguments: Any) -> int:
        if ".chats" in chunks.scope.namespace:
            begun.set()
            if not released.wait(20):
                gave_up.append(True)
        return save(chunks, *arguments)

    plan, other = random_plan(238, chunks=(200, 200)), random_plan(239)
    settings = settings_in(tmp_path)
    with LocalEngine(settings) as engine:
        fix_rates(engine)
        ingest(engine, plan)
        monkeypatch.setattr(ChunkStore, "save", hanging)
        turn = MarkedPrompt(plan.token_ids, plan.preamble_length, ())
        engine.generate(turn, Sampling(max_tokens=40, ignore_eos=True), REPAIR, cache_salt="own")
        assert begun.wait(60)
        answer(engine, other, OFF)
        assert not gave_up  # it was answered meanwhile
        released.set()
        engine.settle()
        monkeypatch.undo()
        assert stored_pieces(engine.chunk_store(chats_of(settings.namespace, "own")), plan.token_ids)


def test_nothing_is_stored_unless_it_is_asked_for(no_engine: None, tmp_path: Path) -> None:
    plan = random_plan(232, chunks=(200, 200, 200))
    settings = settings_in(tmp_path, "local")
    with LocalEngine(settings) as engine:
        fix_rates(engine)
        ingest(engine, plan)
        turn_of(engine, plan)
    assert not list((tmp_path / "kv").glob("*.chats*"))


@pytest.mark.parametrize("length", [0, PIECE_TOKENS - 1, PIECE_TOKENS, 3 * PIECE_TOKENS + 5])
def test_a_piece_is_named_by_all_tokens_before_it(length: int) -> None:
    from lmcache_rag.chunk_kv import variant_of

    tokens = list(range(1000, 1000 + length))
    made = list(pieces(tokens))
    assert [piece.start for piece in made] == list(range(0, length - PIECE_TOKENS + 1, PIECE_TOKENS))
    for piece in made:
        assert piece.token_ids.tolist() == tokens[piece.start : piece.start + PIECE_TOKENS]
        assert piece.variant == variant_of(tokens[: piece.start])
