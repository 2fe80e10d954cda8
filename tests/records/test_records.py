"""The log of records and the view of it: followed, compacted, shared, killed, damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import KVScope, key_of
from lmcache_rag.errors import StoreError
from lmcache_rag.records import records as module
from lmcache_rag.records.merge import merge
from lmcache_rag.records.part import OwnerRow, Part, VariantRow, build
from lmcache_rag.records.records import Records, owner_number

SCOPE = KVScope("default", "f" * 32)
FORM = "a" * 16 + ".raw"


def chunk(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 5000, 60).astype(np.int32)


def key(number: int) -> bytes:
    return key_of(chunk(number))


def save(records: Records, *numbers: int, form: str = FORM, size: int = 100) -> None:
    records.add(
        {key(number): chunk(number) for number in numbers},
        [VariantRow(key(number), form, size, 5) for number in numbers],
    )


def known(records: Records, count: int) -> list[int]:
    """Which of chunks 0 to count - 1 are recorded, with the tokens that they have."""
    records.refresh()
    numbers = [number for number in range(count) if records.variants(key(number))]
    for number in numbers:
        found = records.tokens(key(number))
        assert found is not None and (found == chunk(number)).all()
    return numbers


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path)


@pytest.fixture
def records(store: DiskStore) -> Records:
    return Records(store, SCOPE)


def test_others_follow(store: DiskStore, records: Records) -> None:
    other = Records(store, SCOPE)
    assert known(other, 3) == []
    before = other.position
    save(records, 0, 1)
    assert known(other, 3) == [0, 1]
    assert other.position != before
    save(other, 2, size=7)
    assert known(records, 3) == [0, 1, 2]
    assert records.variants(key(2)) == {FORM: VariantRow(key(2), FORM, 7, 5)}
    save(records, 1, size=0)
    assert known(other, 3) == [0, 2]


def test_a_later_variant_is_added_and_one_of_two_removed(records: Records) -> None:
    save(records, 0)
    save(records, 0, form="b.raw")
    assert set(records.variants(key(0))) == {FORM, "b.raw"}
    save(records, 0, size=0)
    assert set(records.variants(key(0))) == {"b.raw"}
    assert known(records, 1) == [0]


def test_owners(records: Records) -> None:
    save(records, 0, 1)
    one, two = owner_number("one"), owner_number("two")
    records.add({}, owners=[OwnerRow(key(0), one, held=True), OwnerRow(key(1), one, held=True)])
    records.add({}, owners=[OwnerRow(key(0), two, held=True)])
    assert records.owners(key(0)) == {one, two}
    assert set(records.keys_of(one)) == {key(0), key(1)}
    records.add({}, owners=[OwnerRow(key(0), one, held=False)])
    records.compact()
    assert records.owners(key(0)) == {two} and records.keys_of(one) == [key(1)]


def test_compaction_keeps_what_is_known_and_forgets_what_is_gone(
    store: DiskStore, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SEGMENTS", 1 << 30)  # only when asked for
    other = Records(store, SCOPE)
    for number in range(40):
        save(records, number)
        if number % 9 == 8:
            records.compact()
        if number % 11 == 10:
            save(records, number - 3, size=0)
            assert known(other, 40) == known(records, 40)
    expected = [number for number in range(40) if number not in (7, 18, 29)]
    for view in (records, other, Records(store, SCOPE)):
        assert known(view, 40) == expected
    records.compact()
    fresh = Records(store, SCOPE)
    assert known(fresh, 40) == expected
    assert all(part.mapped for part in fresh.parts)
    assert set(fresh.keys()) == {key(number) for number in expected}
    log = store.root / ".records" / SCOPE.namespace / SCOPE.model
    assert len([folder for folder in log.iterdir() if folder.name.isdigit()]) <= 2


def test_it_compacts_by_itself(store: DiskStore, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SEGMENTS", 8)
    for number in range(30):
        save(records, number)
    with records._compacting:  # waits for one under way
        pass
    assert known(records, 30) == list(range(30)) == known(Records(store, SCOPE), 30)
    assert records.position[0] > 1


def test_an_epoch_that_was_ended_and_not_begun_is_begun_by_the_next(store: DiskStore, records: Records) -> None:
    save(records, 0, 1)
    assert records._log.write_segment(1, 2, [b""])  # then its writer died
    before = sorted(path for path in store.root.rglob("*") if path.is_file())
    assert known(Records(store, SCOPE), 3) == [0, 1] == known(records, 3)
    assert sorted(path for path in store.root.rglob("*") if path.is_file()) == before  # who reads writes nothing
    other = Records(store, SCOPE)
    save(other, 2)
    assert other.position == (2, 1)
    assert known(records, 3) == [0, 1, 2]


def test_an_epoch_whose_writer_died_when_it_had_made_a_folder(store: DiskStore, records: Records) -> None:
    save(records, 0, 1)
    assert records._log.write_segment(1, 2, [b""])
    (store.root / ".records" / SCOPE.namespace / SCOPE.model / "000002").mkdir()  # and no base in it
    assert known(Records(store, SCOPE), 3) == [0, 1]
    save(Records(store, SCOPE), 2)
    assert known(Records(store, SCOPE), 3) == [0, 1, 2] == known(records, 3)


def test_a_reader_that_slept_through_several_epochs(
    store: DiskStore, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = Records(store, SCOPE)
    save(records, 0)
    assert known(sleeper, 1) == [0]
    for number in range(1, 6):
        save(records, number)
        records.compact()
    save(sleeper, 6)  # what it writes first lands in an epoch that is gone
    assert known(Records(store, SCOPE), 7) == list(range(7)) == known(sleeper, 7)
    reader = Records(store, SCOPE)
    reader.refresh()
    for number in range(7, 10):
        save(records, number)
        records.compact()
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    assert known(reader, 10) == list(range(10))


def test_damaged_segments_and_bases_cost_what_they_held(
    store: DiskStore, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        save(records, number)
    log = store.root / ".records" / SCOPE.namespace / SCOPE.model
    segment = log / "000001" / "00000002"
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    assert known(Records(store, SCOPE), 3) == [0, 2]
    records.compact()
    (log / "000002" / "base").write_bytes(b"nonsense")
    again = Records(store, SCOPE)
    assert known(again, 3) == [0, 2]  # from the epoch before


def test_a_damaged_base_of_the_epoch_before_does_not_keep_old_ones(store: DiskStore, records: Records) -> None:
    save(records, 0)
    records.compact()
    (store.root / ".records" / SCOPE.namespace / SCOPE.model / "000002" / "base").write_bytes(b"nonsense")
    save(records, 1)
    records.compact()
    assert records._log.epochs() == [2, 3]
    assert known(Records(store, SCOPE), 2) == [0, 1] == known(records, 2)


def test_a_part_that_is_gone(store: DiskStore, records: Records) -> None:
    save(records, 0)
    records.compact()
    save(records, 1)
    for file in (store.root / ".records" / SCOPE.namespace / SCOPE.model / "parts").iterdir():
        file.unlink()
    assert known(Records(store, SCOPE), 2) == [1]


def test_a_part_that_has_rotted_is_not_merged(
    store: DiskStore, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    """It is mapped, so its checksum is not looked at until all of it is read."""
    save(records, 0)
    records.compact()
    (file,) = (store.root / ".records" / SCOPE.namespace / SCOPE.model / "parts").iterdir()
    content = bytearray(file.read_bytes())
    forms = Part.from_bytes(memoryview(content)).variant_form
    at = np.frombuffer(content, np.uint8).ctypes.data
    content[forms.ctypes.data - at + 2] = 7  # a form that there is none of
    file.chmod(0o644)
    file.write_bytes(content)
    again = Records(store, SCOPE)
    again.refresh()
    with pytest.raises(StoreError, match="store rebuild"):
        again.live()
    save(again, 1)
    again.compact()
    assert "is lost" in caplog.text
    assert not again.is_whole and list(again.live().tokens) == [len(chunk(1))]
    assert known(Records(store, SCOPE), 2) == [1]


@pytest.mark.parametrize("cut", [0, 7, 20, 100, -64, -1])
def test_a_part_that_is_cut_short_is_corrupt(cut: int) -> None:
    from lmcache_rag.errors import CorruptObjectError

    part = build({key(0): chunk(0)}, [VariantRow(key(0), FORM, 1, 1)], [OwnerRow(key(0), 3, held=True)])
    data = b"".join(bytes(piece) for piece in part.to_bytes())
    again = Part.from_bytes(memoryview(data))
    assert again.row(key(0)) == 0 and (again.tokens_of(0) == chunk(0)).all() and again.owners_of(0)[0].owner == 3
    with pytest.raises(CorruptObjectError):
        Part.from_bytes(memoryview(data[:cut]))


def test_merging_is_the_same_in_any_grouping() -> None:
    draw = np.random.default_rng(0)
    parts = []
    for _ in range(12):
        numbers = draw.choice(20, 6, replace=False).tolist()
        rows = [VariantRow(key(number), f"{draw.integers(3)}.raw", int(draw.integers(0, 3)), 1) for number in numbers]
        parts.append(build({key(number): chunk(number) for number in numbers}, rows))
    at_once = merge(parts, whole=True)
    in_turn = parts[0]
    for part in parts[1:]:
        in_turn = merge([in_turn, part], whole=False)
    in_turn = merge([in_turn], whole=True)
    assert at_once.forms == in_turn.forms
    for name in ("key_high", "key_low", "token_at", "tokens", "gram", "variant_at", "variant_form", "variant_size"):
        assert (getattr(at_once, name) == getattr(in_turn, name)).all(), name


_WRITER = """
import sys
sys.path.insert(0, {path!r})
from tests.records.test_records import *
from lmcache_rag.records import records as module
module._SEGMENTS = 16
records = Records(DiskStore({root!r}), SCOPE)
for number in range({first}, {last}):
    save(records, number)
    print(number, flush=True)
"""


def writer(store: DiskStore, first: int, last: int) -> subprocess.Popen[str]:
    script = _WRITER.format(path=str(Path(__file__).parents[2]), root=str(store.root), first=first, last=last)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_several_processes_write_at_once(store: DiskStore) -> None:
    writers = [writer(store, 50 * number, 50 * number + 50) for number in range(3)]
    for process in writers:
        assert process.wait(120) == 0
    assert known(Records(store, SCOPE), 150) == list(range(150))


def test_kill_9_loses_nothing_that_was_acknowledged(store: DiskStore) -> None:
    acknowledged = -1
    for attempt in range(6):
        process = writer(store, acknowledged + 1, 1000)
        assert process.stdout is not None
        for _ in range(7 + 5 * attempt):
            acknowledged = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        rest = process.communicate()[0].split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        assert set(range(acknowledged + 1)) <= set(known(Records(store, SCOPE), acknowledged + 2))
