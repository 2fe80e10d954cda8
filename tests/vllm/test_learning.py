"""Text that recurs in prompts is learned while nothing is asked, with no call of ours in the application."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lmcache_rag.engine import Completion, LocalEngine, Sampling
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.names import learned_of
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.vllm.metadata import Refined
from tests.conftest import Engines
from tests.helpers import OFF, answer, connector, fix_rates, ingest, random_plan, worker_half
from tests.vllm.apps import App, ask, settings_in


@pytest.fixture(scope="module")
def engine(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    engines.close()
    with LocalEngine(settings_in(tmp_path_factory.mktemp("learning"))) as engine:
        fix_rates(engine)
        yield engine


def reused(done: Completion) -> int:
    return done.reuse.reused_tokens + done.reuse.recomputed_tokens + done.reuse.local_tokens


@pytest.mark.parametrize("salt", [None, "own"])
def test_from_the_third_question_on_the_documents_are_reused(engine: LocalEngine, salt: str | None) -> None:
    app = App(300)
    for number in (0, 1):
        assert reused(ask(engine, app.prompt(number), salt)) < 0.4 * app.context_tokens
        engine.settle()
    for number in (2, 3):
        done = ask(engine, app.prompt(number), salt)
        assert done.reuse.mode == "blend"
        assert done.reuse.learned_tokens > 0 and reused(done) >= 0.8 * app.context_tokens
        engine.settle()


def learned_chunks(engine: LocalEngine, salt: str | None = None) -> ChunkStore:
    return engine.chunk_store(learned_of(engine.settings.namespace, salt))


def test_what_was_seen_once_is_not_stored(engine: LocalEngine) -> None:
    before = learned_chunks(engine).records.size_bytes
    first, second = App(302), App(303)
    for app in (first, second):
        ask(engine, app.prompt(0))
        engine.settle()
    ask(engine, first.prompt(0)[:-5])  # only the beginning is common
    engine.settle()
    assert learned_chunks(engine).records.size_bytes == before


def test_tenants_learn_apart(engine: LocalEngine) -> None:
    app = App(304)
    for number in (0, 1):
        ask(engine, app.prompt(number), "one")
        engine.settle()
    assert list(learned_chunks(engine, "one").records.keys())
    for salt in ("another", None):
        done = ask(engine, app.prompt(2), salt)
        assert done.reuse.mode == "plain" and done.reuse.learned_tokens == done.reuse.local_tokens == 0
        engine.settle()  # its first sighting
        assert not app_chunks(engine, app, salt)
    assert ask(engine, app.prompt(2), "one").reuse.learned_tokens > 0


def app_chunks(engine: LocalEngine, app: App, salt: str | None) -> list[bytes]:
    """What is learned of an application's documents."""
    records = learned_chunks(engine, salt).records
    known = {triple for passage in app.passages for triple in _triples(passage)}
    return [key for key in list(records.keys()) if sum(t in known for t in _triples(records.tokens(key))) > 30]


def _triples(token_ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(map(int, token_ids[at : at + 3])) for at in range(len(token_ids) - 2)]


def test_what_is_ingested_is_not_learned(engine: LocalEngine) -> None:
    app = App(305)
    ingest(engine, MarkedPrompt.assemble(app.preamble, app.passages, [7]))
    for number in (0, 1, 2):
        done = ask(engine, app.prompt(number))
        assert done.reuse.learned_tokens == 0
        engine.settle()
    assert not app_chunks(engine, app, None)


def test_a_request_comes_before_the_next_piece(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    app, other = App(306), random_plan(307, chunks=(200,))
    ask(engine, app.prompt(0))
    engine.settle()
    refiner = worker_half()._refiner
    advance, done, between = refiner.advance, [], []

    def advanced() -> int:
        tokens = advance()
        done.append(tokens)
        if len(done) == 2:  # in the engine's thread, so that the request is there when the piece ends
            sampling = Sampling(max_tokens=4, ignore_eos=True)
            engine._submit(list(other.token_ids), sampling, OFF, "other", lambda _: between.append(len(done)))
        return tokens

    monkeypatch.setattr(refiner, "advance", advanced)
    monkeypatch.setattr(worker_half(), "_rates", replace(worker_half()._rates, held_s=None))  # so it is computed
    ask(engine, app.prompt(1))
    engine.settle()
    assert between and set(between) == {2}  # all of its answer
    assert done == sorted(done) and len(done) > 2  # and then it went on from where it was
    assert app_chunks(engine, app, None)


def test_no_request_waits_for_what_is_learned_to_be_stored(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, begun, released, gave_up = ChunkStore.save, threading.Event(), threading.Event(), []

    def hanging(chunks: ChunkStore, *arguments: Any) -> int:
        begun.set()
        if not released.wait(20):
            gave_up.append(True)
        return save(chunks, *arguments)

    app, other = App(308), random_plan(309)
    ask(engine, app.prompt(0))
    monkeypatch.setattr(ChunkStore, "save", hanging)
    ask(engine, app.prompt(1))
    assert begun.wait(60)
    answer(engine, other, OFF)
    assert not gave_up  # it was answered meanwhile
    released.set()
    engine.settle()
    assert app_chunks(engine, app, None)


def test_learning_that_fails_harms_nobody(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(chunks: ChunkStore, *arguments: Any) -> int:
        raise MemoryError

    app, counted = App(310), []
    half = connector(engine).scheduler
    monkeypatch.setattr(half.stats, "refined", lambda *figures: counted.append(figures[1]))
    ask(engine, app.prompt(0))
    with monkeypatch.context() as patched:
        patched.setattr(ChunkStore, "save", broken)
        ask(engine, app.prompt(1))
        engine.settle()
    assert counted[-1] == Refined(failure="MemoryError")
    assert ask(engine, app.prompt(2)).reuse.mode == "plain"
    engine.settle()
    assert not app_chunks(engine, app, None)  # it is not tried again at once
    half._refinements._no_room_at -= 100
    ask(engine, app.prompt(3))
    engine.settle()
    assert sum(refined.learned_tokens for refined in counted) > 0.8 * app.context_tokens
    assert app_chunks(engine, app, None)
