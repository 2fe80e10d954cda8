"""`kill -9` at random moments: nothing acknowledged is lost, nothing is wrong, and the limit holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from lmcache_rag.bench.doomed import LIMITS, SCOPE, object_of, tokens_of
from lmcache_rag.bench.faults import Faults, bench_faults
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import key_of
from lmcache_rag.records.records import Records

DOOMED = (sys.executable, "-m", "lmcache_rag.bench.doomed")


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


def test_two_processes_that_write_at_once_keep_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_rag.records.records._LOOK_S", 0.0)  # the writers' epochs are short: it may miss two
    limit = LIMITS.capacity_bytes or 0
    writers = [subprocess.Popen([*DOOMED, str(tmp_path)], stdin=PIPE, stdout=PIPE, text=True) for _ in range(2)]
    pids = []
    for number, writer in enumerate(writers):
        assert writer.stdin is not None and writer.stdout is not None
        print("ingest", 10_000 * number, file=writer.stdin, flush=True)
        pids.append(int(writer.stdout.readline().split()[1]))
    records = Records(DiskStore(tmp_path), SCOPE)
    largest, stored = 0, 0
    while stored < 200:
        for writer in writers:
            assert writer.stdout is not None
            line = writer.stdout.readline()
            assert line.startswith(("stored", "going")), line
            stored += line.startswith("stored")
        records.refresh()
        largest = max(largest, records.size_bytes)
    for pid, writer in zip(pids, writers, strict=True):
        os.kill(pid, signal.SIGKILL)
        writer.communicate()
    assert 0.9 * limit < largest <= 1.02 * limit
