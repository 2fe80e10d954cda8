"""A chunk's variant as a residual against the primed one: read as their sum, and never without what it is against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lmcache_rag_kernels import Rotation, Rows
from typer.testing import CliRunner

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.tiers import Cache, TieredStore
from lmcache_rag.chunk_kv import RESIDUAL, ChunkKV, KVScope, KVShape, StoredForm, base_of, codec_in, key_of, variant_of
from lmcache_rag.codec.tables import learn_tables
from lmcache_rag.library.chunks import ChunkStore, ChunkStores
from lmcache_rag.library.commands import store_app
from lmcache_rag.library.hot import HeldKV, HotChunks
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.names import parsed
from lmcache_rag.library.rebuild import rebuild
from lmcache_rag.library.room import Limits, Room, Rooms
from lmcache_rag.library.tables import ModelCodecs, TableStore
from lmcache_rag.library.verify import recorded_names
from tests.stores import MemoryStore

SHAPE = KVShape(layers=2, kv_heads=2, head_size=16, dtype=torch.float32)
SCOPE = KVScope("docs", "f" * 32)
PREAMBLE = np.arange(9, dtype=np.int32)
PLAIN = variant_of(PREAMBLE)
PRIMED, LATER = variant_of(PREAMBLE, [1, 2, 3]), variant_of(PREAMBLE, [4, 5])
TOKENS = np.arange(150, dtype=np.int32)
KEY = key_of(TOKENS)
NEAR = 0.2
"""A codec's error, relative; that of what is left out would be more."""


def kv_of(seed: int, like: torch.Tensor | None = None, tokens: int = len(TOKENS)) -> ChunkKV:
    """KV, on its own or much like another."""
    shape = (SHAPE.layers, 2, tokens, SHAPE.kv_heads, SHAPE.head_size)
    kv = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return ChunkKV(TOKENS[:tokens], kv if like is None else like + 0.25 * kv)


ONE = kv_of(1)
TWO = kv_of(2, ONE.kv)


def opened(store: Any, codec: str = "balanced", **others: Any) -> ChunkStore:
    chunks = ChunkStore(store, SCOPE, codec, ModelCodecs(store, SCOPE.model, SHAPE), **others)
    chunks.refresh()
    return chunks


def with_tables(store: Any) -> Any:
    basis = torch.eye(32).expand(2, 2, 1, -1, -1)
    draw = torch.Generator().manual_seed(5)
    TableStore(store, SCOPE.model).add(learn_tables(torch.randn(2, 2, 1000, 32, generator=draw), basis))
    return store


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStore:
    """A chunk primed, and behind the preamble alone."""
    chunks = opened(with_tables(DiskStore(tmp_path / "kv")))
    chunks.save(ONE, PRIMED)
    chunks.save(TWO, PLAIN)
    return chunks


def forms(chunks: ChunkStore) -> set[str]:
    chunks.refresh()
    return set(chunks.records.variants(KEY))


def residual(chunks: ChunkStore) -> str:
    """The residual's name."""
    (form,) = filter(base_of, forms(chunks))
    return next(name for name in chunks.store.list(SCOPE.prefix) if parsed(name)[1] == form)


def base(chunks: ChunkStore) -> str:
    return chunks.name(TOKENS, PRIMED)


def damage(store: Any, name: str) -> None:
    data = bytearray(store.read(name) or b"")
    data[-1] ^= 1
    store.write(name, [data])


def distance(loaded: object, expected: torch.Tensor) -> float:
    assert isinstance(loaded, LoadedKV)
    return float((loaded.kv() - expected).norm() / expected.norm())


def test_it_takes_fewer_bytes_and_is_read_as_the_sum(chunks: ChunkStore) -> None:
    whole = opened(with_tables(MemoryStore())).save(TWO, PLAIN)
    rows = chunks.records.variants(KEY)
    (form,) = filter(base_of, rows)
    assert (base_of(form), codec_in(form)) == (f"{PRIMED}.balanced", "balanced")
    assert rows[form].size_bytes < 0.8 * whole
    assert not chunks.missing(TOKENS, PLAIN) and not chunks.missing(TOKENS, PRIMED)
    both = rows[form].size_bytes + rows[base_of(form)].size_bytes
    found = chunks.variants(KEY)
    assert {variant: each.size_bytes for variant, each in found.items()} == {
        PLAIN: both,
        PRIMED: rows[base_of(form)].size_bytes,
    }
    loaded = chunks.load(found[PLAIN].name, SHAPE)
    assert isinstance(loaded, LoadedKV) and (loaded.size_bytes, loaded.codec) == (both, "balanced")
    assert distance(loaded, TWO.kv) < NEAR < distance(loaded, ONE.kv)


def test_it_counts_as_a_form_of_its_bases_codec(tmp_path: Path) -> None:
    chunks = opened(with_tables(DiskStore(tmp_path / "kv")), extra=("high", "small", "raw"))
    chunks.save(ONE, PRIMED)
    chunks.save(TWO, PLAIN)
    plain = chunks.forms(chunks.variants(KEY)[PLAIN].name)
    assert [codec_in(parsed(form.name)[1]) for form in plain] == ["raw", "high", "balanced", "small"]
    assert [bool(base_of(parsed(form.name)[1])) for form in plain] == [False, True, True, True]
    sizes = [form.size_bytes for form in plain]
    assert sizes == sorted(sizes, reverse=True)
    for form in plain:
        loaded = chunks.load(form.name, SHAPE)
        assert isinstance(loaded, LoadedKV) and loaded.size_bytes == form.size_bytes


@pytest.mark.parametrize("codec", ["raw", "q8", "cachegen"])
def test_other_codecs_store_each_variant_whole(tmp_path: Path, codec: str) -> None:
    chunks = opened(DiskStore(tmp_path / "kv"), codec)
    chunks.save(ONE, PRIMED)
    chunks.save(TWO, PLAIN)
    assert forms(chunks) == {f"{PRIMED}.{codec}", f"{PLAIN}.{codec}"}


def test_without_a_primed_variant_it_is_whole_and_stays_so(tmp_path: Path) -> None:
    chunks = opened(with_tables(DiskStore(tmp_path / "kv")))
    chunks.save(TWO, PLAIN)
    chunks.save(ONE, PRIMED)
    chunks.save(TWO, PLAIN)
    assert forms(chunks) == {f"{PRIMED}.balanced", f"{PLAIN}.balanced"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [range(10), range(60, 70), range(63, 129), range(140, 150)], ids=str)
def test_parts_are_read_and_placed_alone(tmp_path: Path, part: range, dtype: torch.dtype) -> None:
    shape = KVShape(SHAPE.layers, SHAPE.kv_heads, SHAPE.head_size, dtype)
    store = with_tables(DiskStore(tmp_path / "kv"))
    chunks = ChunkStore(store, SCOPE, "balanced", ModelCodecs(store, SCOPE.model, shape))
    for kv, variant in ((ONE, PRIMED), (TWO, PLAIN)):
        chunks.save(ChunkKV(TOKENS, kv.kv.to(dtype)), variant)
    angles = torch.outer(torch.arange(300).float(), torch.tensor([1.0, 0.2]))
    name, rotation = chunks.variants(KEY)[PLAIN].name, Rotation(angles.cos(), angles.sin())
    whole, some = chunks.load(name, shape), chunks.load(name, shape, part)
    assert isinstance(whole, LoadedKV) and isinstance(some, LoadedKV)
    placed = torch.empty(2, SHAPE.layers, len(part), SHAPE.kv_heads, SHAPE.head_size, dtype=dtype)
    expected = torch.empty_like(placed)
    some.place(part.start, Rows(placed[0], placed[1], 7, [rotation, None]))
    ChunkKV(TOKENS, whole.kv()).place(part.start, Rows(expected[0], expected[1], 7, [rotation, None]))
    torch.testing.assert_close(placed, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.02)


def test_what_is_hot_is_the_sum(chunks: ChunkStore) -> None:
    name = chunks.variants(KEY)[PLAIN].name
    stores = ChunkStores(chunks.store, SCOPE.model, "balanced", ModelCodecs(chunks.store, SCOPE.model, SHAPE))
    hot = HotChunks(stores, 1 << 24)
    found = [hot.load(name, SHAPE) for _ in range(3)][-1]
    assert isinstance(found, HeldKV) and found.size_bytes == 0
    key, value = torch.empty(2, SHAPE.layers, len(TOKENS), SHAPE.kv_heads, SHAPE.head_size)
    found.place(0, Rows(key, value, 0, [None, None]))
    loaded = chunks.load(name, SHAPE)
    assert isinstance(loaded, LoadedKV) and torch.equal(torch.stack([key, value], 1), loaded.kv())


def test_a_residual_against_another_one_is_not_read(chunks: ChunkStore) -> None:
    name = residual(chunks)
    nested = name.replace(f".{RESIDUAL}.", f".{RESIDUAL}.{PRIMED}.{RESIDUAL}.")
    assert chunks.load(nested, SHAPE) == "of an unknown codec"
    assert not isinstance(chunks.load(name, SHAPE), str)


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_without_its_base_it_is_a_miss_and_computed_again(chunks: ChunkStore, how: str) -> None:
    name, primed = residual(chunks), base(chunks)
    if how == "damaged":
        damage(chunks.store, primed)
    else:
        chunks.store.delete([primed])
    assert chunks.load(name, SHAPE) == ("corrupt" if how == "damaged" else "absent")
    assert forms(chunks) == set() and not chunks.store.exists(name)
    assert chunks.missing(TOKENS, PLAIN) == chunks.missing(TOKENS, PRIMED) == ["balanced"]


def test_a_base_that_is_gone_makes_both_missing_before_anybody_reads_them(chunks: ChunkStore) -> None:
    chunks.store.delete([base(chunks)])
    assert chunks.missing(TOKENS, PLAIN) == chunks.missing(TOKENS, PRIMED) == ["balanced"]


def test_a_damaged_residual_leaves_its_base(chunks: ChunkStore) -> None:
    name = residual(chunks)
    damage(chunks.store, name)
    assert chunks.load(name, SHAPE) == "corrupt"
    assert forms(chunks) == {f"{PRIMED}.balanced"} and chunks.missing(TOKENS, PLAIN) == ["balanced"]


def test_a_base_that_was_computed_again_is_another_one(chunks: ChunkStore) -> None:
    """Another machine may get other bits: added to them, the residual would be wrong."""
    name = residual(chunks)
    chunks.store.delete([base(chunks)])
    chunks.save(kv_of(3, ONE.kv), PRIMED)
    assert chunks.load(name, SHAPE) == "a residual against another object"
    assert forms(chunks) == {f"{PRIMED}.balanced"}
    chunks.save(TWO, PLAIN)
    assert distance(chunks.load(chunks.variants(KEY)[PLAIN].name, SHAPE), TWO.kv) < NEAR


def test_a_base_whose_earlier_copy_is_in_a_cache(tmp_path: Path) -> None:
    origin = with_tables(DiskStore(tmp_path / "kv"))
    store = TieredStore([Cache("disk", DiskStore(tmp_path / "cache"))], origin)
    opened(store).save(kv_of(3), PRIMED)
    store.flush()
    elsewhere = opened(origin)
    elsewhere.delete([KEY])
    elsewhere.save(ONE, PRIMED)
    elsewhere.save(TWO, PLAIN)
    chunks = opened(store)
    assert distance(chunks.load(chunks.variants(KEY)[PLAIN].name, SHAPE), TWO.kv) < NEAR


def test_deleting_the_base_takes_the_residual_along(chunks: ChunkStore) -> None:
    """As an index does with what is behind a primer that it has outgrown."""
    name = residual(chunks)
    chunks.save(kv_of(4, ONE.kv), LATER)
    chunks.delete([KEY], PRIMED)
    assert forms(chunks) == {f"{LATER}.balanced"} and not chunks.store.exists(name)
    chunks.save(TWO, PLAIN)
    assert base_of(parsed(residual(chunks))[1]) == f"{LATER}.balanced"


def test_deleting_the_residual_leaves_the_base(chunks: ChunkStore) -> None:
    chunks.delete([KEY], PLAIN)
    assert forms(chunks) == {f"{PRIMED}.balanced"}


def test_a_second_primer_leaves_the_residual_as_it_is(chunks: ChunkStore) -> None:
    name = residual(chunks)
    chunks.save(kv_of(4, ONE.kv), LATER)
    assert not chunks.missing(TOKENS, PLAIN) and residual(chunks) == name


def test_it_is_a_use_of_both(chunks: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    monkeypatch.setattr(chunks.uses, "note", lambda _key, form: noted.append(form))
    chunks.load(residual(chunks), SHAPE)
    assert set(noted) == forms(chunks)


def test_eviction_takes_both_or_the_residual() -> None:
    """Also where making room for a residual evicts what it is against."""
    store = with_tables(MemoryStore())
    one, two = opened(store).save(ONE, PRIMED), opened(store).save(TWO, PLAIN)
    clock = [1_800_000_000]
    rooms = Rooms(store, Limits(capacity_bytes=4 * (one + two)))
    room: Room = rooms.of(SCOPE.namespace)
    room._clock = lambda: float(clock[0])
    chunks = opened(store, rooms=rooms)
    for number in range(12):
        tokens = np.arange(1000 * number, 1000 * number + len(TOKENS), dtype=np.int32)
        chunks.save(ChunkKV(tokens, ONE.kv), PRIMED)
        chunks.save(ChunkKV(tokens, TWO.kv), PLAIN)
        clock[0] += 3601
        names = {name for name in store.blobs if name.startswith(SCOPE.prefix)}
        assert names == set(recorded_names(SCOPE, chunks.records))
        by_key: dict[bytes, set[str]] = {}
        for key, form, _ in map(parsed, names):
            by_key.setdefault(key, {""}).add(form)
        assert all(base_of(form) in known for known in by_key.values() for form in known)
    assert room.evicted.objects


def run(*arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(store_app, [*arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def folder_of(chunks: ChunkStore) -> str:
    return str(chunks.store.root)  # type: ignore[attr-defined]


def test_stat_and_verify_know_it(chunks: ChunkStore) -> None:
    _, (row,) = run("stat", folder_of(chunks))
    rows = chunks.records.variants(KEY)
    sizes = {bool(base_of(form)): each.size_bytes for form, each in rows.items()}
    assert row["bytes_by_codec"] == {"balanced": sizes[False], "residual": sizes[True]}
    assert row["bytes_by_kind"] == {"primed": sizes[False], "unprimed": sizes[True]}
    code, (found,) = run("verify", folder_of(chunks))
    assert (code, found["checked"], found["damaged"], found["missing"]) == (0, 2, {}, [])


def test_verify_finds_a_residual_against_another_object(chunks: ChunkStore) -> None:
    name, primed = residual(chunks), base(chunks)
    chunks.store.delete([primed])
    chunks.save(kv_of(3, ONE.kv), PRIMED)
    _, (found,) = run("verify", folder_of(chunks))
    assert found["damaged"] == {name: "it is a residual against another object"}
    run("verify", folder_of(chunks), "--repair")
    assert forms(chunks) == {f"{PRIMED}.balanced"} and not chunks.store.exists(name)


def test_repairing_a_base_deletes_the_residual_too(chunks: ChunkStore) -> None:
    name, primed = residual(chunks), base(chunks)
    damage(chunks.store, primed)
    _, (found,) = run("verify", folder_of(chunks), "--repair")
    assert list(found["damaged"]) == [primed]
    assert forms(chunks) == set() and not chunks.store.exists(name)


def test_records_made_anew_without_the_base(chunks: ChunkStore) -> None:
    """The residual is recorded, cannot be read, and verify says so."""
    name = residual(chunks)
    chunks.store.delete([base(chunks)])
    rebuild(chunks.store, SCOPE)
    chunks.refresh()
    assert chunks.variants(KEY) == {} and chunks.missing(TOKENS, PLAIN) == ["balanced"]
    _, (found,) = run("verify", folder_of(chunks))
    assert found["damaged"] == {name: "what it is a residual against is gone"}


def test_a_copy_has_both_or_the_base(chunks: ChunkStore, tmp_path: Path) -> None:
    code, (row,) = run("cp", folder_of(chunks), str(tmp_path / "copy"))
    assert (code, row["objects"], row["left_out"]) == (0, 2, 0)
    copied = opened(DiskStore(tmp_path / "copy"))
    assert distance(copied.load(copied.variants(KEY)[PLAIN].name, SHAPE), TWO.kv) < NEAR
    damage(chunks.store, base(chunks))
    code, (row,) = run("cp", folder_of(chunks), str(tmp_path / "other"))
    assert (code, row["objects"], row["left_out"]) == (1, 0, 2)


def test_earlier_releases_take_it_for_an_unknown_codec(chunks: ChunkStore) -> None:
    """They take what follows a form's first dot for its codec. A later kind of residual is as unknown to this one."""
    (form,) = filter(base_of, forms(chunks))
    assert form.partition(".")[2] == f"residual.{PRIMED}.balanced"
    assert codec_in(f"{PLAIN}.later.{PRIMED}.balanced") == f"later.{PRIMED}.balanced"
    assert not base_of(f"{PLAIN}.later.{PRIMED}.balanced")


def test_what_is_stored_whole_says_nothing_of_a_base(chunks: ChunkStore) -> None:
    """Its header is as earlier releases read it."""
    assert b'"base"' not in bytes(chunks.store.read(base(chunks)) or b"")[:2000]
    assert b'"base":{"form":' in bytes(chunks.store.read(residual(chunks)) or b"")[:2000]


def test_forms_name_no_other(chunks: ChunkStore) -> None:
    only = chunks.forms(base(chunks))
    assert only == [StoredForm(base(chunks), chunks.records.variants(KEY)[f"{PRIMED}.balanced"].size_bytes)]
