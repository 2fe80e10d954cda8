"""`kill -9` at random moments: nothing acknowledged is lost, nothing is wrong, and the limit holds."""

from __future__ import annotations

from pathlib import Path

from lmcache_rag.bench.doomed import SCOPE, object_of, tokens_of
from lmcache_rag.bench.faults import Faults, bench_faults
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import key_of


def test_writers_that_are_killed(tmp_path: Path) -> None:
    rows, wrong = bench_faults(tmp_path, 20, lambda _note: None, seed=7)
    assert not wrong
    assert sum(row["kills"] for row in rows) == 20 and not any(row["wrong"] for row in rows)


def test_what_is_lost_or_wrong_is_noticed(tmp_path: Path) -> None:
    from lmcache_rag.bench import doomed

    store = DiskStore(tmp_path)
    room = doomed.Room(store, SCOPE.namespace, doomed.LIMITS)
    faults = Faults(tmp_path)
    for number in range(3):
        doomed.save(store, room, number)
        faults.heard(f"stored {number}\n")
    faults.check("first")
    assert not faults.wrong
    faults.heard("stored 9\n")
    name = doomed.object_name(SCOPE, key_of(tokens_of(1)), doomed.FORM)
    store.write(name, [*object_of(1)[:-1], b"\xff" * len(object_of(1)[-1])])
    store.delete([doomed.object_name(SCOPE, key_of(tokens_of(2)), doomed.FORM)])
    faults.check("second")
    assert {problem.split(": ")[1] for problem in faults.wrong} == {"damaged", "missing", "lost", "wrong"}
