"""How much is stored and when it was used: counted as it changes, and the same as counted anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lmcache_rag.chunk_kv import KVScope, key_of
from lmcache_rag.errors import StoreError
from lmcache_rag.records import records as module
from lmcache_rag.records.part import OwnerRow, Part, VariantRow, build
from lmcache_rag.records.records import Records
from tests.stores import FailingStore, MemoryStore

SCOPE = KVScope("default", "f" * 32)
CHUNKS, FORMS = 6, ("a.raw", "b.raw")


def tokens(number: int) -> np.ndarray:
    return np.arange(number, number + 40 + number, dtype=np.int32)


def key(number: int) -> bytes:
    return key_of(tokens(number))


def add(records: Records, number: int, form: str = FORMS[0], size: int = 10, used_s: int = 5) -> None:
    records.add({key(number): tokens(number)} if size else {}, [VariantRow(key(number), form, size, used_s)])


def recount(records: Records) -> int:
    return sum(row.size_bytes for each in list(records.keys()) for row in records.variants(each).values())


OPERATION = st.one_of(
    st.tuples(st.just("add"), st.integers(0, CHUNKS - 1), st.sampled_from(FORMS), st.integers(0, 1000)),
    st.tuples(st.just("use"), st.integers(0, CHUNKS - 1), st.sampled_from(FORMS), st.integers(1, 1000)),
    st.tuples(st.sampled_from(["compact", "reopen", "ask", "look", "restart"])),
)


@given(st.lists(st.tuples(st.booleans(), OPERATION), max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_running_total_is_what_a_recount_says(operations: list[tuple[bool, tuple]]) -> None:
    store = MemoryStore()
    views = [Records(store, SCOPE), Records(store, SCOPE)]
    for second, (name, *arguments) in operations:
        records = views[second]
        if name == "add":
            add(records, *arguments)
        elif name == "use":
            records.use({(key(arguments[0]), arguments[1]): arguments[2]})
        elif name == "compact":
            records.compact()
        elif name == "reopen":
            views[second] = Records(store, SCOPE)
        elif name == "look":
            records._look(records._number)
        elif name == "restart":
            records.refresh()
            records.restart([build({key(1): tokens(1)}, [VariantRow(key(1), FORMS[0], 7, 1)])])
            views[not second]._look(views[not second]._number)
        else:
            records.refresh()
            assert records.size_bytes == recount(records)
    for records in views:
        records.refresh()
        assert records.size_bytes == recount(records)
        found = records.live()
        assert int(found.size_bytes.sum()) == records.size_bytes
        assert {found.key(chunk) for chunk in found.chunk.tolist()} == set(records.keys())
        for chunk, form, size, used_s in zip(found.chunk, found.form, found.size_bytes, found.used_s, strict=True):
            row = records.variants(found.key(chunk))[found.forms[form]]
            assert (row.size_bytes, row.used_s) == (size, used_s)
            assert found.tokens[chunk] == len(records.tokens(found.key(chunk)))


def test_a_restart_is_seen_by_those_who_found_nothing() -> None:
    store = MemoryStore()
    records, other = Records(store, SCOPE), Records(store, SCOPE)
    other.refresh()
    records.restart([build({key(1): tokens(1)}, [VariantRow(key(1), FORMS[0], 7, 1)])])
    add(records, 1, size=8)
    other.refresh()
    assert other.tokens(key(1)) is not None and other.variants(key(1))[FORMS[0]].size_bytes == 8


@pytest.mark.parametrize("writes", range(6))
def test_who_dies_while_restarting_costs_nobody_what_is_recorded_afterwards(writes: int) -> None:
    """After so many writes. What is recorded then is there after the next compaction too."""
    store = MemoryStore()
    records = Records(store, SCOPE)
    add(records, 0)
    records.compact()
    add(records, 1)
    left = iter(range(writes))

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            next(left)
            return write(*arguments)

        return wrapped

    living = store.write, store.write_if_absent
    store.write, store.write_if_absent = map(dying, living)  # type: ignore[method-assign, assignment]
    with contextlib.suppress(StopIteration):
        Records(store, SCOPE).restart([build({key(0): tokens(0)}, [VariantRow(key(0), FORMS[0], 10, 5)])])
    store.write, store.write_if_absent = living  # type: ignore[method-assign]
    writer = Records(store, SCOPE)
    add(writer, 2)
    writer.compact()
    for view in (writer, Records(store, SCOPE)):
        view.refresh()
        assert set(view.keys()) >= {key(0), key(2)}


def test_uses_are_seen_by_others_and_survive_compaction() -> None:
    store = MemoryStore()
    records, other = Records(store, SCOPE), Records(store, SCOPE)
    add(records, 0)
    records.use({(key(0), FORMS[0]): 99, (key(1), FORMS[0]): 99})
    records.compact()
    other.refresh()
    assert other.variants(key(0))[FORMS[0]] == VariantRow(key(0), FORMS[0], 10, 99)
    assert set(other.keys()) == {key(0)}


def test_a_use_does_not_bring_back_what_another_deletes_at_that_moment() -> None:
    store = MemoryStore()
    records, other = Records(store, SCOPE), Records(store, SCOPE)
    add(records, 0)
    write = store.write_if_absent
    deletions = iter([lambda: add(other, 0, size=0)])

    def after_a_deletion(name: str, parts: list) -> bool:
        for delete in deletions:
            delete()
        return write(name, parts)

    store.write_if_absent = after_a_deletion  # type: ignore[method-assign]
    records.use({(key(0), FORMS[0]): 99})
    assert not records.variants(key(0)) and records.size_bytes == 0


def test_owners_and_lengths_in_all_that_is_stored() -> None:
    records = Records(MemoryStore(), SCOPE)
    assert len(records.live().chunk) == 0 == records.size_bytes
    add(records, 0)
    add(records, 3, FORMS[1])
    records.add({}, owners=[OwnerRow(key(3), 7, held=True), OwnerRow(key(0), 7, held=False)])
    found = records.live()
    assert [found.key(chunk) for chunk in found.held_chunk] == [key(3)] and found.owner.tolist() == [7]


def newer(part: Part) -> list[bytes | memoryview]:
    first, *rest = part.to_bytes()
    return [bytes(first[:8]) + (2).to_bytes(4, "little") + bytes(first[12:]), *rest]


@pytest.mark.parametrize("where", ["segment", "part"])
def test_what_a_later_release_recorded_is_refused_and_kept(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """It is no damaged record, which would be passed over and then compacted away."""
    store = MemoryStore()
    records = Records(store, SCOPE)
    add(records, 0)
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    later = newer(build({key(1): tokens(1)}, [VariantRow(key(1), FORMS[0], 7, 1)]))
    if where == "segment":
        records._log.write_segment(1, 2, later)
    else:
        records._log.begin(2, [records._log.write_part(1, later)])
        records._log.point(2)
    before = dict(store.blobs)
    for view in (records, Records(store, SCOPE)):
        for attempt in (view.refresh, view.compact, lambda view=view: add(view, 2), view.refresh):
            with pytest.raises(StoreError, match="recorded by a later release"):
                attempt()
    assert store.blobs == before


def test_of_a_store_that_may_only_be_read_uses_are_not_recorded() -> None:
    store = MemoryStore()
    add(Records(store, SCOPE), 0)
    records = Records(FailingStore(store), SCOPE)  # type: ignore[arg-type]
    records.refresh()
    with pytest.raises(StoreError):
        records.use({(key(0), FORMS[0]): 99})
    assert records.variants(key(0))[FORMS[0]].used_s == 5 and records.size_bytes == 10


def test_parts_are_written_as_earlier_releases_read_them() -> None:
    header = bytes(build({}, [VariantRow(key(0), FORMS[0], 7, 1)]).to_bytes()[0])
    assert b'"variant_created"' in header and b"variant_used" not in header
