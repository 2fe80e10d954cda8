"""Following records over a network: by a thread, so that whoever plans waits for nothing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.errors import StoreError
from lmcache_rag.records import follower as module
from lmcache_rag.records.records import Records
from tests.records.test_records import FORM, SCOPE, key, known, save
from tests.test_process import in_a_fork


class Remote(DiskStore):
    """A disk far away: it says which threads read it, and may hang or fail."""

    remote = True

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.threads: set[int] = set()
        self.reads = threading.Semaphore(0)
        self.answers = threading.Event()
        self.answers.set()
        self.fails = False

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        self.threads.add(threading.get_ident())
        self.reads.release()
        self.answers.wait(60)
        if self.fails:
            raise StoreError("The network is down.")
        return super().read(name, start, length)


@pytest.fixture
def store(tmp_path: Path) -> Remote:
    return Remote(tmp_path)


def follow_until(records: Records, store: Remote, number: int) -> None:
    """Look at the records, as requests do, until a chunk is known."""
    while not records.variants(key(number)):
        with suppress(StoreError):
            records.follow()
        assert store.reads.acquire(timeout=60), "nobody reads"


def end_of_following() -> None:
    for thread in threading.enumerate():
        if thread.name == "lmcache-rag-follow":
            thread.join(60)
            assert not thread.is_alive()


def test_what_others_write_is_seen_and_nothing_is_read_by_who_looks(store: Remote, tmp_path: Path) -> None:
    other, records = Records(DiskStore(tmp_path), SCOPE), Records(store, SCOPE)
    save(other, 0)
    follow_until(records, store, 0)
    save(other, 1)
    follow_until(records, store, 1)
    assert threading.get_ident() not in store.threads and len(store.threads) == 1


def test_looking_waits_for_nothing(store: Remote, tmp_path: Path) -> None:
    save(Records(DiskStore(tmp_path), SCOPE), 0)
    store.answers.clear()
    records = Records(store, SCOPE)
    for _ in range(3):
        records.follow()  # would hang
    assert not records.variants(key(0))
    store.answers.set()
    follow_until(records, store, 0)


def test_a_store_that_fails_is_told_until_it_works(store: Remote, tmp_path: Path) -> None:
    records = Records(store, SCOPE)
    store.fails = True
    records.follow()
    for _ in range(2):  # the second one comes after the first has failed
        assert store.reads.acquire(timeout=60)
    with pytest.raises(StoreError, match="The network is down"):
        records.follow()
    store.fails = False
    save(Records(DiskStore(tmp_path), SCOPE), 0)
    follow_until(records, store, 0)
    records.follow()


def test_nobody_follows_what_nobody_uses(store: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNUSED_S", -1.0)
    records = Records(store, SCOPE)
    records.follow()
    follower = records._follower
    assert follower is not None
    end_of_following()
    assert not follower._running
    monkeypatch.setattr(module, "_UNUSED_S", 300.0)
    save(Records(DiskStore(tmp_path), SCOPE), 0)
    follow_until(records, store, 0)  # and it is taken up again
    gone = weakref.ref(records)
    del records
    end_of_following()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("patient", [True, False])
def test_a_view_that_may_wait_is_followed_less_often_while_nobody_looks(*, patient: bool) -> None:
    class View:
        def refresh(self) -> None:
            return

    views, waits = [View()], list[float]()
    follower = module.Follower(views[0].refresh, patient=patient)
    follower._used = time.monotonic() - 20.0

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 6:
            views.clear()  # and with it the following ends

    follower._asked.wait = wait  # type: ignore[assignment]
    follower._follow()
    assert waits == ([0.6, 1.2, 2.4, 4.8, 5.0, 5.0] if patient else [0.3] * 6)
    follower.look()
    assert follower._asked.is_set()  # at once


def test_a_disk_is_read_by_who_looks(tmp_path: Path) -> None:
    records = Records(DiskStore(tmp_path), SCOPE)
    save(Records(DiskStore(tmp_path), SCOPE), 0)
    records.follow()
    assert records.variants(key(0)) and records._follower is None


def test_all_who_share_a_store_over_a_network_share_its_records(store: Remote, tmp_path: Path) -> None:
    one, two = Records.of(store, SCOPE), Records.of(store, SCOPE)
    assert one is two and Records.of(Remote(tmp_path), SCOPE) is not one
    assert Records.of(DiskStore(tmp_path), SCOPE) is not Records.of(DiskStore(tmp_path), SCOPE)
    save(one, 0)
    assert set(two.variants(key(0))) == {FORM}


def test_a_fork_is_told(store: Remote) -> None:
    records = Records(store, SCOPE)
    save(records, 0)
    records.follow()
    with ThreadPoolExecutor(1) as another:
        another.submit(records._lock.acquire).result()  # as the thread may hold it
        for use in (records.follow, records.refresh, lambda: save(records, 1)):
            assert in_a_fork(use).startswith("StoreError: A view of a store's records belongs to the process")
        another.submit(records._lock.release).result()
    assert known(records, 2) == [0]
