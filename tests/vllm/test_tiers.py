"""An engine on a bucket, with a cache on its disk: it blends, knows what others store, and outlives the bucket."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmcache_rag.bench.servers import S3Server
from lmcache_rag.blobs.tiers import TieredStore
from lmcache_rag.chunk_kv import key_of
from lmcache_rag.engine import EngineSettings, LocalEngine, precompute_texts, prefetch_texts
from lmcache_rag.engine.texts import chunks_of
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.request import BlendOptions, ReuseReport
from tests.blobs.conftest import open_apart
from tests.helpers import OFF, answer, connector, ingest, noise, parts, random_plan, worker_half
from tests.models import make_tiny
from tests.servers import FaultyProxy

ALL = BlendOptions(ratio=1.0)
HEAD = BlendOptions(selector="head", ratio=0.2)


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.port)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server, proxy: FaultyProxy, engines: object
) -> Iterator[LocalEngine]:
    engines.close()  # type: ignore[attr-defined]
    folder = tmp_path_factory.mktemp("bucket")
    settings = EngineSettings(
        model=str(make_tiny("llama", folder / "tiny")),
        store=s3_server.uri("engine", proxy.port),
        tiers=(f"file://{folder}/cache?capacity=1GB",),
        dtype="float32",
        kv_cache_bytes=64 << 20,
        primed=False,
    )
    with LocalEngine(settings) as started:
        yield started


@pytest.fixture(autouse=True)
def _works(proxy: FaultyProxy) -> Iterator[None]:
    yield
    proxy.fault = lambda method, path: None


def tiers_of(engine: LocalEngine) -> TieredStore:
    assert isinstance(engine.store, TieredStore)
    return engine.store


def from_another_engine(engine: LocalEngine, s3_server: S3Server) -> ChunkStore:
    """The same chunks, as an engine on another machine knows them."""
    store = open_apart(s3_server.uri("engine"))
    return ChunkStore(store, engine.chunk_store().scope, "raw", worker_half()._chunks.of("default")._codecs)


def blobs_read(proxy: FaultyProxy) -> int:
    """How many objects the bucket was asked for; the records are asked for all the time."""
    return sum(method == "GET" and "/engine/default/" in path for method, path in proxy.requests)


def test_it_blends_from_the_cache_and_from_the_bucket(engine: LocalEngine, proxy: FaultyProxy) -> None:
    plan, tiers = random_plan(700), tiers_of(engine)
    ingest(engine, plan)
    expected, _ = answer(engine, plan, OFF)
    found, done = answer(engine, plan, ALL)
    assert done.reuse.mode == "blend" and not done.reuse.missed_tokens
    torch.testing.assert_close(found, expected, atol=20 * noise(engine, plan), rtol=0)
    assert not blobs_read(proxy)
    again, done = answer(engine, plan, HEAD)
    assert not done.reuse.missed_tokens
    assert not blobs_read(proxy)  # all of it was in the cache
    [name] = [form.name for form in engine.chunk_store().variants(key_of(parts(plan)[1][0])).values()]
    assert tiers.tier_of(name) == tiers.caches[0].label

    shutil.rmtree(Path(tiers.caches[0].store.root) / "default")  # type: ignore[attr-defined]
    from_bucket, done = answer(engine, plan, HEAD)
    assert not done.reuse.missed_tokens and torch.equal(from_bucket, again)
    assert blobs_read(proxy) and tiers.stats()["s3://kv-bucket/engine"].read_bytes
    tiers.flush()
    assert tiers.tier_of(name) == tiers.caches[0].label  # and it is in the cache again


def test_what_a_retriever_found_is_brought_nearer(engine: LocalEngine, proxy: FaultyProxy) -> None:
    tiers, texts = tiers_of(engine), ["w21 " * 60, "w22 w23 " * 30]
    assert not precompute_texts(engine, [5, 6, 7], texts).errors
    shutil.rmtree(Path(tiers.caches[0].store.root) / "default")  # type: ignore[attr-defined]
    names = [
        form.name
        for chunk in chunks_of(engine, texts)[0].values()
        for form in engine.chunk_store().variants(key_of(chunk)).values()
    ]
    for name in names:
        assert tiers.read(name, 0, 1) is not None  # so that the cache knows that it has it no more
        assert tiers.tier_of(name) is None
    assert prefetch_texts(engine, texts) == len(names) == 2
    tiers.flush()
    label = tiers.caches[0].label
    assert {tiers.tier_of(name) for name in names} == {label}
    prompt = [token for chunk in ([5, 6, 7], *chunks_of(engine, texts)[0].values(), [8, 9]) for token in chunk]
    plan = connector(engine).scheduler._planner.plan(prompt, HEAD, ReuseReport())
    assert [segment.tier for segment in plan.segments] == [label] * 2
    assert prefetch_texts(engine, texts) == 0


def test_what_another_engine_stores_is_reused_without_a_restart(engine: LocalEngine, s3_server: S3Server) -> None:
    plan, other = random_plan(701), from_another_engine(engine, s3_server)
    _, none = answer(engine, plan, HEAD)
    assert none.reuse.reused_tokens == 0
    ingest(engine, plan)
    expected, done = answer(engine, plan, HEAD)
    assert done.reuse.mode == "blend"
    other.refresh()
    stored = {key: form for chunk in parts(plan)[1] for key in [key_of(chunk)] for form in other.variants(key).values()}
    blobs = {form.name: bytes(other.store.read(form.name) or b"") for form in stored.values()}
    tokens = {key: other.records.tokens(key) for key in stored}
    rows = [row for key in stored for row in other.records.variants(key).values()]
    other.delete(stored)
    view = connector(engine).scheduler._planner._chunks.of("default")
    while any(view.variants(key) for key in stored):  # within a poll or two
        view.follow()
    _, gone = answer(engine, plan, HEAD)
    assert gone.reuse.mode != "blend"
    for name, content in blobs.items():
        other.store.write(name, [content])
    other.records.add({key: ids for key, ids in tokens.items() if ids is not None}, rows)
    while not all(view.variants(key) for key in stored):
        view.follow()
    found, done = answer(engine, plan, HEAD)
    assert done.reuse.mode == "blend" and not done.reuse.missed_tokens and torch.equal(found, expected)


def test_planning_reads_nothing_over_the_network(engine: LocalEngine, proxy: FaultyProxy) -> None:
    plan = random_plan(702)
    ingest(engine, plan)
    scheduler = connector(engine).scheduler
    planner = scheduler._planner
    proxy.fault = lambda method, path: "hang"
    planned = planner.plan(plan.token_ids, HEAD, ReuseReport())  # would hang, and then fail
    assert planned is not None and planned.segments


def test_a_bucket_that_dies(engine: LocalEngine, proxy: FaultyProxy) -> None:
    plan, tiers = random_plan(703), tiers_of(engine)
    ingest(engine, plan)
    expected, _ = answer(engine, plan, OFF)
    reused, _ = answer(engine, plan, HEAD)
    proxy.fault = lambda method, path: 403
    cached, done = answer(engine, plan, HEAD)
    assert not done.reuse.missed_tokens and torch.equal(cached, reused)  # the cache still has it

    shutil.rmtree(Path(tiers.caches[0].store.root) / "default")  # type: ignore[attr-defined]
    found, done = answer(engine, plan, HEAD)
    assert set(done.reuse.misses) == {"unreadable"} and done.reuse.missed_tokens >= sum(map(len, parts(plan)[1]))
    torch.testing.assert_close(found, expected, atol=20 * noise(engine, plan), rtol=0)
    assert tiers.stats()["s3://kv-bucket/engine"].failures


def test_a_bucket_without_caches_that_dies(engine: LocalEngine, proxy: FaultyProxy, s3_server: S3Server) -> None:
    """What the planner is told then: the reason stands in the report."""
    from lmcache_rag.library.chunks import ChunkStores
    from lmcache_rag.plan.budget import ASSUMED
    from lmcache_rag.plan.planner import Planner
    from lmcache_rag.request import ReuseReport

    plan = random_plan(703)
    store = open_apart(s3_server.uri("engine", proxy.port))
    chunks = ChunkStores(store, engine.model_fingerprint, "raw")
    planner = Planner(chunks, ASSUMED, namespace="default", matcher=Matcher(40), max_tokens=1000, never_slower=False)
    chunks.of("default").refresh()
    assert planner.plan(plan.token_ids, HEAD, ReuseReport()) is not None
    proxy.fault = lambda method, path: 403
    report = ReuseReport()
    while planner.plan(plan.token_ids, HEAD, report) is not None:
        pass
    assert report.reason.startswith("store: ") and "access is denied" in report.reason
    proxy.fault = lambda method, path: None
    while planner.plan(plan.token_ids, HEAD, ReuseReport()) is None:
        pass
