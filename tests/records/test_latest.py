"""The hint at the newest epoch: it saves listing, and whatever it says costs no fact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.records import records as module
from lmcache_rag.records.part import VariantRow, build
from lmcache_rag.records.records import Records
from tests.records.test_records import FORM, SCOPE, chunk, key, known, save

LATEST = f".records/{SCOPE.prefix}latest"


class CountingDisk(DiskStore):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: Counter[str] = Counter()

    def folders(self, prefix: str) -> list[str]:
        self.calls["folders"] += 1
        return list(super().folders(prefix))


@pytest.fixture(autouse=True)
def _looks_at_each_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", -1.0)
    monkeypatch.setattr(module, "_SEGMENTS", 1 << 30)  # compacts only when asked to


@pytest.fixture
def store(tmp_path: Path) -> CountingDisk:
    return CountingDisk(tmp_path)


@pytest.fixture
def records(store: CountingDisk) -> Records:
    return Records(store, SCOPE)


def grown(records: Records, epochs: int) -> int:
    """Some epochs with facts in each; how many chunks are known then."""
    for number in range(2 * epochs):
        save(records, number)
        if number % 2:
            records.compact()
    save(records, 2 * epochs)
    return 2 * epochs + 1


def test_nothing_is_listed_to_follow_to_add_or_to_open(store: CountingDisk, records: Records) -> None:
    count = grown(records, 2)
    reader = Records(store, SCOPE)
    store.calls.clear()
    assert known(reader, count) == list(range(count))
    save(records, count)
    assert known(reader, count + 1) == list(range(count + 1)) == known(Records(store, SCOPE), count + 1)
    assert not store.calls


@pytest.mark.parametrize("hint", [b"", b"1", b"2", b"3", b"99", b"nonsense", b"-1", b"3" * 40, b"\xff", b"0"])
def test_a_stale_or_damaged_hint_loses_nothing(store: CountingDisk, records: Records, hint: bytes) -> None:
    reader = Records(store, SCOPE)
    reader.refresh()
    count = grown(records, 3)  # epochs 3 and 4 are left
    store.write(LATEST, [hint])
    for view in (Records(store, SCOPE), reader, records):
        assert known(view, count) == list(range(count))
    save(reader, count)
    save(records, count + 1)
    records.compact()
    for view in (Records(store, SCOPE), reader, records):
        assert known(view, count + 2) == list(range(count + 2))
    assert store.read(LATEST) == b"5"


def test_a_hint_that_is_gone_loses_nothing(store: CountingDisk, records: Records) -> None:
    count = grown(records, 3)
    store.delete([LATEST])
    assert known(Records(store, SCOPE), count) == list(range(count)) == known(records, count)
    save(records, count)
    assert known(Records(store, SCOPE), count + 1) == list(range(count + 1))


def test_who_slept_through_epochs_writes_where_it_is_seen(store: CountingDisk, records: Records) -> None:
    """Also where the hint has gone back to an epoch long ended, of which it sees its own segments only."""
    sleeper = Records(store, SCOPE)
    save(sleeper, 100)
    count = grown(records, 4)
    for hint in (b"1", b"5"):
        store.write(LATEST, [hint])
        sleeper._looked_at = float("inf")  # it does not look before it writes
        save(sleeper, count)
        assert count in known(Records(store, SCOPE), count + 1)
        assert known(sleeper, count + 1) == list(range(count + 1))
        count += 1
        sleeper._epoch, sleeper._number = 1, 1  # as it was when it fell asleep
        sleeper._base, sleeper._names, sleeper._fresh = [], [], []


def test_who_slept_through_epochs_begins_none_that_was_forgotten(store: CountingDisk, records: Records) -> None:
    sleeper = Records(store, SCOPE)
    save(sleeper, 100)
    count = grown(records, 4)
    latest = store.read(LATEST)
    sleeper._looked_at = float("inf")  # it does not look before it compacts
    sleeper.compact()
    assert store.read(LATEST) == latest
    save(sleeper, count)
    for view in (sleeper, records, Records(store, SCOPE)):
        assert known(view, count + 1) == list(range(count + 1))


def test_an_epoch_is_pointed_at_before_older_ones_are_forgotten(
    store: CountingDisk, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever died in between left a hint that is behind by one, from where the log leads on."""
    count = grown(records, 2)
    monkeypatch.setattr(records._log, "point", lambda epoch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        records.compact()
    assert store.read(LATEST) == b"3" and records._log.epochs() == [2, 3, 4]
    assert known(Records(store, SCOPE), count) == list(range(count))


def test_records_that_are_made_anew_are_found_by_those_who_follow_the_old_ones(
    store: CountingDisk, records: Records
) -> None:
    save(records, 0, 1)
    follower = Records(store, SCOPE)
    assert known(follower, 2) == [0, 1]
    Records(store, SCOPE).restart([build({key(2): chunk(2)}, [VariantRow(key(2), FORM, 1, 1)])])
    store.write(LATEST, [b"1"])  # and the hint says nothing of it
    assert known(follower, 3) == [2] == known(Records(store, SCOPE), 3)
    save(follower, 0)
    assert known(records, 3) == [0, 2]
