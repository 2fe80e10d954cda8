"""What `kill -9` costs: writers are killed at random moments, and what they leave behind is read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from lmcache_rag.bench.doomed import FORM, LIMITS, SCOPE, TASKS, object_of, tokens_of
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.chunk_kv import key_of
from lmcache_rag.library.garbage import collect
from lmcache_rag.library.names import object_name
from lmcache_rag.library.room import Limits
from lmcache_rag.library.verify import verify
from lmcache_rag.records.records import Records

Row = dict[str, Any]

_MOST_LINES, _MOST_S = 12, 0.02
"""A writer is killed so many lines and seconds after it began, at most."""

_OVER = 1.02
"""So far over the limit counts as held."""


class Faults:
    """What writers said that are dead, and what was found to be otherwise."""

    def __init__(self, folder: Path) -> None:
        self.wrong: list[str] = []
        self.stored: set[int] = set()
        self._folder = folder
        self._numbers: dict[str, int] = {}
        self._going: set[str] = set()
        self._evicting = False

    def heard(self, line: str) -> None:
        """Take what a writer said."""
        word, *rest = line.split()
        if word == "stored":
            number = int(rest[0])
            self.stored.add(number)
            self._numbers[key_of(tokens_of(number)).hex()] = number
            self._evicting = True
        elif word == "going":
            self._going.update(rest)
        elif word == "failed":
            self.wrong.append(line)

    def check(self, trial: str) -> None:
        """Read all that is recorded, as a new process would."""
        store = DiskStore(self._folder)
        records = Records(store, SCOPE)
        records.refresh()
        found = verify(store, SCOPE, records)
        self._note(trial, "damaged", found.damaged)
        self._note(trial, "missing", found.missing)
        self.stored -= {self._numbers[key] for key in self._going & self._numbers.keys()}
        self._going.clear()
        for number in self.stored:
            key = key_of(tokens_of(number))
            if FORM not in records.variants(key):
                self._note(trial, "lost", [number])
            elif bytes(store.read(object_name(SCOPE, key, FORM)) or b"") != b"".join(object_of(number)):
                self._note(trial, "wrong", [number])
        assert LIMITS.capacity_bytes is not None
        if self._evicting and records.size_bytes > _OVER * LIMITS.capacity_bytes:
            self._note(trial, "over the limit", [records.size_bytes])
        self._evicting = False

    def finish(self) -> None:
        """After garbage was collected, there is what is recorded and nothing else."""
        store = DiskStore(self._folder)
        collect(store, Limits(), wait=lambda: None)
        records = Records(store, SCOPE)
        records.refresh()
        size = sum(store.size(name) or 0 for name in store.list(SCOPE.prefix))
        if size != records.size_bytes:
            self._note("at the end", "bytes that are not recorded", [size - records.size_bytes])
        self.check("at the end")

    def _note(self, trial: str, what: str, found: Any) -> None:
        if found:
            self.wrong.append(f"{trial}: {what}: {list(found)[:5]}")


def bench_faults(
    folder: Path, trials: int, progress: Callable[[str], Any], seed: int = 0
) -> tuple[list[Row], list[str]]:
    """A row for each task, and what was found wrong.

    Args:
        folder: an empty one.
    """
    draw, faults, done, first = np.random.default_rng(seed), Faults(folder), Counter[str](), 0
    tasks = list(TASKS)
    with _nursery(folder) as (orders, said):
        for trial in range(trials):
            task = tasks[trial % len(tasks)]
            progress(f"trial {trial + 1} of {trials}: {task}")
            print(task, first, file=orders, flush=True)
            pid, wanted = int(said.readline().split()[1]), int(draw.integers(_MOST_LINES))
            for number, line in enumerate(iter(said.readline, "end\n")):
                faults.heard(line)
                if number == wanted:
                    time.sleep(draw.random() * _MOST_S)
                    os.kill(pid, signal.SIGKILL)
            first = max(faults.stored, default=first) + 2  # the one under way may be there, or half of it
            faults.check(f"trial {trial + 1}, {task}")
            done[task] += 1
    faults.finish()
    wrong = Counter(problem.partition(": ")[0].rpartition(", ")[2] for problem in faults.wrong)
    return [{"task": task, "kills": done[task], "wrong": wrong[task]} for task in tasks], faults.wrong


@contextmanager
def _nursery(folder: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    command = [sys.executable, "-m", "lmcache_rag.bench.doomed", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdin, process.stdout
        process.stdin.close()
