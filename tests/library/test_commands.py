"""`lmcache-rag store`: what it shows, finds, deletes and copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import ChunkKV, KVScope, KVShape, key_of, variant_of
from lmcache_rag.cli.app import store_app
from lmcache_rag.codec.tables import learn_tables
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore, ChunkStores
from lmcache_rag.library.garbage import collect
from lmcache_rag.library.loaded import LoadedKV
from lmcache_rag.library.room import Limits
from lmcache_rag.library.tables import ModelCodecs, TableStore
from lmcache_rag.library.verify import verify
from lmcache_rag.plan.budget import ASSUMED
from lmcache_rag.plan.matching import Matcher
from lmcache_rag.plan.planner import Planner
from lmcache_rag.plan.why import explain
from lmcache_rag.records.fingerprints import SHORTEST
from lmcache_rag.records.part import VariantRow
from tests.stores import FailingStore, MemoryStore

SHAPE = KVShape(layers=2, kv_heads=1, head_size=8, dtype=torch.float32)
MODEL = "f" * 32
PREAMBLE = np.arange(9, dtype=np.int32)
OWN, PRIMED = variant_of(PREAMBLE), variant_of(PREAMBLE, [1, 2, 3])


def chunk(number: int, tokens: int = 60) -> ChunkKV:
    ids = np.random.default_rng(number).integers(0, 1 << 20, tokens, dtype=np.int32)
    return ChunkKV(ids, torch.randn(2, 2, tokens, 1, 8, generator=torch.Generator().manual_seed(number)))


def key(number: int) -> bytes:
    return key_of(chunk(number).token_ids)


def opened(store: Any, namespace: str = "docs", codec: str = "balanced") -> ChunkStore:
    chunks = ChunkStore(store, KVScope(namespace, MODEL), codec, ModelCodecs(store, MODEL, SHAPE))
    chunks.refresh()
    return chunks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of two namespaces: chunks 0 to 3, two of them primed, owned by two indexes; 0 is pinned."""
    folder = tmp_path / "kv"
    store = DiskStore(folder)
    basis = torch.eye(8).expand(2, 2, 1, -1, -1)
    for seed in (1, 2):
        TableStore(store, MODEL).add(
            learn_tables(torch.randn(2, 2, 500, 8, generator=torch.Generator().manual_seed(seed)), basis)
        )
    chunks = opened(store)
    chunks.save_preamble(ChunkKV(PREAMBLE, torch.zeros(2, 2, 9, 1, 8)))
    for number in range(4):
        chunks.save(chunk(number), OWN)
    for number in range(2):
        chunks.save(chunk(number), PRIMED)
    chunks.own("one", [key(0), key(1)])
    chunks.own("two", [key(1), key(2)])
    chunks.pin([key(0)])
    opened(store, "other", "raw").save(chunk(9), OWN)
    return folder


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(store_app, [*arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def contents(folder: Path) -> dict[str, Any]:
    """What a store answers: its KV, when it was used, and who owns it."""
    store, found = DiskStore(folder), {}
    for namespace, codec in (("docs", "balanced"), ("other", "raw")):
        chunks = opened(store, namespace, codec)
        for each in list(chunks.records.keys()):
            for variant, form in chunks.variants(each).items():
                loaded = chunks.load(form.name, SHAPE)
                assert isinstance(loaded, LoadedKV), loaded
                owners, tokens = sorted(chunks.records.owners(each)), chunks.records.tokens(each)
                assert tokens is not None
                found[form.name] = (variant, form.used_s, owners, tokens.tolist(), loaded.kv().sum().item())
    return found


def test_stat(folder: Path) -> None:
    docs, other = run("stat", str(folder), "--deep")
    assert (docs["namespace"], docs["chunks"], docs["objects"], docs["tokens"]) == ("docs", 5, 7, 249)
    assert (docs["owners"], docs["pinned_chunks"], docs["unreferenced_bytes"]) == (2, 1, 0)
    assert set(docs["bytes_by_codec"]) == {"balanced", "raw"}
    assert set(docs["bytes_by_kind"]) == {"preamble", "primed", "unprimed"}
    on_disk = sum(path.stat().st_size for path in (folder / "docs").rglob("*") if path.is_file())
    assert docs["bytes"] == sum(docs["bytes_by_codec"].values()) == sum(docs["bytes_by_kind"].values()) == on_disk
    assert docs["tables_bytes"] > 0 and docs["records_bytes"] > 0 and docs["oldest_use"] <= docs["newest_use"]
    assert other["chunks"] == 1
    assert [row["namespace"] for row in run("stat", str(folder), "--namespace", "other")] == ["other"]


def test_ls(folder: Path) -> None:
    rows = {row["key"]: row for row in run("ls", str(folder), "--namespace", "docs")}
    assert len(rows) == 5 and len(run("ls", str(folder), "--limit", "2")) == 2
    first = rows[key(0).hex()]
    assert first["tokens"] == 60 and first["pinned"] and len(first["owners"]) == 1
    assert first["forms"] == sorted([f"{OWN}.balanced", f"{PRIMED}.balanced"])
    assert {row["key"] for row in run("ls", str(folder), "--owner", "two")} == {key(1).hex(), key(2).hex()}
    assert {row["key"] for row in run("ls", str(folder), "--owner", first["owners"][0])} == {key(0).hex(), key(1).hex()}


def test_pins(folder: Path) -> None:
    result = CliRunner().invoke(store_app, ["pin", str(folder), key(2).hex()])
    assert result.exit_code == 0 and "1 chunks pinned" in result.stdout
    CliRunner().invoke(store_app, ["unpin", str(folder), key(0).hex()])
    assert {row["key"] for row in run("ls", str(folder)) if row["pinned"]} == {key(2).hex()}
    assert CliRunner().invoke(store_app, ["pin", str(folder), "00" * 16]).exit_code == 1


def test_verify_finds_what_is_damaged_and_repairs_it(folder: Path) -> None:
    assert all(not row["damaged"] and not row["missing"] for row in run("verify", str(folder)))
    chunks = opened(DiskStore(folder))
    names = [chunks.name(chunk(number).token_ids, OWN) for number in range(4)]
    paths = [folder.joinpath(*name.split("/")) for name in names]
    data = bytearray(paths[0].read_bytes())
    data[-1] ^= 1
    paths[0].write_bytes(data)
    paths[1].write_bytes(paths[2].read_bytes())
    paths[3].unlink()
    stray = paths[2].with_name("0" * 16 + ".raw.v3")
    stray.write_bytes(b"what a writer left that died")
    row = run("verify", str(folder), "--namespace", "docs", code=1)[0]
    assert set(row["damaged"]) == {names[0], names[1]} and row["missing"] == [names[3]]
    assert row["unrecorded"] == [stray.relative_to(folder).as_posix()] and row["checked"] == 7
    sampled = CliRunner().invoke(store_app, ["verify", str(folder), "--namespace", "docs", "--sample", "2", "--json"])
    assert json.loads(sampled.stdout)[0]["checked"] == 2
    run("verify", str(folder), "--repair", code=1)
    again = run("verify", str(folder))[0]
    assert not again["damaged"] and not again["missing"] and again["checked"] == 4
    assert opened(DiskStore(folder)).missing(chunk(0).token_ids, OWN) == ["balanced"]


def test_what_is_stored_anew_while_others_are_read_is_not_repaired(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = opened(DiskStore(folder))
    name = chunks.name(chunk(0).token_ids, OWN)
    path = folder.joinpath(*name.split("/"))
    whole = path.read_bytes()
    path.write_bytes(b"damaged")

    def stored_anew(checked: int) -> None:
        if checked == 7:  # all
            path.write_bytes(whole)

    found = verify(chunks.store, chunks.scope, chunks.records, repair=True, progress=stored_anew)
    assert name in found.damaged and path.read_bytes() == whole
    assert not opened(DiskStore(folder)).missing(chunk(0).token_ids, OWN)


def test_gc_deletes_what_no_record_names_and_what_has_expired(folder: Path) -> None:
    store = DiskStore(folder)
    before = contents(folder)
    place = "docs/" + MODEL + "/ab/" + "ab" * 16
    strays = [f"{place}/{OWN}.raw.v3", f"{place}/{OWN}.raw.v2"]
    later = f"{place}/{OWN}.raw.v9"
    stored_meanwhile = chunk(50)
    for name in (*strays, later):
        store.write(name, [b"x"])

    def wait() -> None:
        opened(store).save(stored_meanwhile, OWN)

    assert sorted(run("gc", str(folder), "--grace-s", "0", "--dry-run")[0]["unrecorded"]) == sorted(strays)
    assert all(map(store.exists, strays))
    found = collect(store, Limits(), wait=wait)
    assert sorted(found.unrecorded) == sorted(strays) and not found.expired and not found.tables
    assert not any(map(store.exists, strays)) and store.exists(later)
    after = contents(folder)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    chunks = opened(store)
    chunks.records.use({(key(3), f"{OWN}.balanced"): 1000, (key(0), f"{OWN}.balanced"): 1000})
    found = collect(store, Limits(ttl_s=86400.0), wait=wait)
    assert found.expired == [chunks.name(chunk(3).token_ids, OWN)]  # chunk 0 is pinned


def test_gc_deletes_nothing_where_it_cannot_know_what_is_needed(folder: Path) -> None:
    store = DiskStore(folder)
    objects = [name for name in store.list("docs/") if name.endswith(".v3")]
    parts = [name for name in store.list(".records/") if "docs" in name]
    for lose in (lambda: store.write(parts[2], [b"damaged"]), lambda: store.delete(parts)):
        lose()
        result = CliRunner().invoke(store_app, ["gc", str(folder), "--grace-s", "0"])
        assert isinstance(result.exception, StoreError) and "store rebuild" in str(result.exception)
        assert all(map(store.exists, objects))
    assert CliRunner().invoke(store_app, ["rebuild", str(folder)]).exit_code == 0
    assert not run("gc", str(folder), "--grace-s", "0")[0]["unrecorded"]
    assert all(map(store.exists, objects))


def test_gc_deletes_earlier_tables_where_nothing_was_coded_with_any(folder: Path) -> None:
    store = DiskStore(folder)
    run("rm", str(folder), "--namespace", "docs", "--yes")
    found = run("gc", str(folder), "--grace-s", "0")[0]
    assert len(found["tables"]) == 1 and "/000001." in found["tables"][0]
    assert TableStore(store, MODEL).last() is not None


def test_rm(folder: Path) -> None:
    assert CliRunner().invoke(store_app, ["rm", str(folder), "--owner", "two"], input="n\n").exit_code == 1
    assert len(run("ls", str(folder))) == 6
    removed = run("rm", str(folder), "--owner", "two", "--yes")[0]
    assert removed["chunks"] == 2 and removed["bytes"] > 0
    assert {row["key"] for row in run("ls", str(folder), "--owner", "one")} == {key(0).hex()}
    assert run("rm", str(folder), "--unused-since", "1", "--yes")[0]["chunks"] == 0
    assert run("rm", str(folder), "--key", key(3).hex(), "--yes")[0]["chunks"] == 1
    run("rm", str(folder), "--namespace", "docs", "--yes")
    assert {row["namespace"] for row in run("ls", str(folder))} == {"other"}
    result = CliRunner().invoke(store_app, ["rm", str(folder), "--yes"])
    assert isinstance(result.exception, StoreError)


def test_a_copy_answers_as_the_store_does(folder: Path, tmp_path: Path) -> None:
    expected, target = contents(folder), tmp_path / "copy"
    first = run("cp", str(folder), str(target))
    assert sum(row["objects"] for row in first) == 8
    assert contents(target) == expected
    again = run("cp", str(folder), str(target))
    assert sum(row["present"] for row in again) == 8 and not sum(row["objects"] for row in again)
    shutil.copytree(folder, tmp_path / "plain")
    assert contents(tmp_path / "plain") == expected
    assert run("cp", str(folder), str(tmp_path / "part"), "--namespace", "other")[0]["objects"] == 1
    assert len(contents(tmp_path / "part")) == 1


def test_a_copy_that_was_interrupted_goes_on_and_damaged_objects_stay_behind(folder: Path, tmp_path: Path) -> None:
    from lmcache_rag.library.contents import Selection
    from lmcache_rag.library.copying import copy_scope, copy_tables

    source, target = DiskStore(folder), MemoryStore()
    scope, records = Selection("docs").of(source)[0]
    for left in range(1, 100):
        copy = FailingStore(target, 1)
        try:
            copy_tables(source, copy, scope.model)
            copied = copy_scope(source, copy, scope, records)
        except StoreError:
            target_bytes = len(target.blobs)
            assert target_bytes >= min(left, 2)
            copy.left = left
            try:
                copied = copy_scope(source, copy, scope, records)
            except StoreError:
                continue
        break
    assert copied.left_out == 0
    assert len([name for name in target.blobs if name.startswith("docs/")]) == 7
    path = folder.joinpath(*opened(source).name(chunk(3).token_ids, OWN).split("/"))
    path.write_bytes(path.read_bytes()[:-4])
    other = MemoryStore()
    assert copy_scope(source, other, scope, records).left_out == 1
    assert not any(key(3).hex() in name for name in other.blobs)


def test_a_store_without_a_folder_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(store_app, ["stat", str(tmp_path / "none")])
    assert isinstance(result.exception, StoreError) and "There is no store" in str(result.exception)


def test_why(folder: Path) -> None:
    stores = ChunkStores(DiskStore(folder), MODEL, "balanced")
    planner = Planner(stores, ASSUMED, namespace="docs", matcher=Matcher(), max_tokens=4096, never_slower=False)
    new = np.arange(5000, 5040, dtype=np.int32)
    prompt = np.concatenate([PREAMBLE, chunk(2).token_ids, chunk(0).token_ids, new, chunk(1).token_ids[10:50], new[:5]])
    rows, reason = explain(planner, stores, "docs", prompt, SHORTEST)
    assert not reason and sum(row["tokens"] for row in rows) == len(prompt)
    assert [(row["reuse"], row["tokens"]) for row in rows] == [
        ("exact", 9),
        ("exact", 60),
        ("repaired", 60),
        ("no", 40),
        ("repaired", 40),
        ("no", 5),
    ]
    assert rows[2]["variant"] == PRIMED and rows[4]["offset"] == 10 and rows[2]["codec"] == "balanced"
    rows, reason = explain(planner, stores, "docs", new, SHORTEST)
    assert reason == "no stored chunk in the prompt" and [row["why"] for row in rows] == ["in no stored chunk"]
    opened(DiskStore(folder)).records.add({}, [VariantRow(key(2), f"{OWN}.balanced", 0, 1)])
    rows, reason = explain(planner, stores, "docs", np.concatenate([PREAMBLE, chunk(2).token_ids]), SHORTEST)
    assert reason and all(row["reuse"] == "no" for row in rows)


def test_why_of_a_file_without_an_engine(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.models import make_tiny

    make_tiny("llama", tmp_path / "model")
    words = " ".join(f"w{number}" for number in range(10, 90))
    ids = np.array(AutoTokenizer.from_pretrained(tmp_path / "model").encode(words), dtype=np.int32)
    opened(DiskStore(tmp_path / "kv"), "default", "raw").save(
        ChunkKV(ids, torch.zeros(2, 2, len(ids), 1, 8)), variant_of([])
    )
    (tmp_path / "prompt.txt").write_text(words)
    options = ["--store", str(tmp_path / "kv"), "--model", str(tmp_path / "model")]
    rows = run("why", str(tmp_path / "prompt.txt"), *options)
    assert rows[0]["reuse"] == "exact" and rows[0]["tokens"] >= len(ids) - 1
    result = CliRunner().invoke(store_app, ["why", str(tmp_path / "prompt.txt")])
    assert "--index" in str(result.exception)
