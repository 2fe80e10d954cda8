"""The disk store: whole objects or none, whatever happens to the writer or the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.errors import StoreError

NAME = "default/model/ab/abcd/0000.raw.v1"


def test_write_read_list_delete(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv")
    assert store.read(NAME) is None
    assert store.write(NAME, [b"one", memoryview(b"two")]) == 6
    assert store.exists(NAME)
    read = store.read(NAME)
    assert read is not None and bytes(read) == b"onetwo"
    for start, length, expected in ((0, 4, b"onet"), (2, 3, b"etw"), (4, 100, b"wo"), (9, 1, b"")):
        part = store.read(NAME, start, length)
        assert part is not None and bytes(part) == expected
    mapped = store.map(NAME)
    assert mapped is not None and bytes(mapped) == b"onetwo" and store.map("default/none") is None
    assert list(store.folders("default/")) == ["model"] and list(store.folders("none/")) == []
    assert list(store.list("default/model/")) == [NAME]
    store.delete([NAME, "default/model/never/there"])
    assert not store.exists(NAME)
    assert list(store.list("default/")) == []


def test_of_several_writers_one_is_first(tmp_path: Path) -> None:
    stores = [DiskStore(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda number: stores[number].write_if_absent(NAME, [bytes([number])]), range(8)))
    assert sum(first) == 1
    read = stores[0].read(NAME)
    assert read is not None and bytes(read) == bytes([first.index(True)])
    assert not list((tmp_path / ".unfinished").iterdir())


def test_a_folder_that_another_process_removes_before_a_file_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path)
    replace, folder = os.replace, tmp_path.joinpath(NAME).parent

    removals = iter([folder.rmdir])

    def after_a_removal(source: Path, target: Path) -> None:
        for remove in removals:
            remove()
        replace(source, target)

    monkeypatch.setattr(os, "replace", after_a_removal)
    assert store.write(NAME, [b"one"]) == 3
    assert store.size(NAME) == 3


def test_what_the_disk_refuses_to_look_up_is_not_absent(tmp_path: Path) -> None:
    store, too_long = DiskStore(tmp_path), "default/" + "x" * 300
    store.write("default/name", [b"one"])
    assert store.size(NAME) is None and not store.exists(NAME)
    for look_up in (store.size, store.exists, store.read):
        with pytest.raises(StoreError, match="could not be"):
            look_up(too_long)


def test_a_killed_writer_leaves_no_object(tmp_path: Path) -> None:
    script = (
        "import sys; from lmcache_rag.blobs.disk import DiskStore\n"
        "def parts():\n    yield b'x' * (1 << 20)\n    print('writing', flush=True); sys.stdin.read()\n"
        f"DiskStore({str(tmp_path)!r}).write({NAME!r}, parts())"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    store = DiskStore(tmp_path)
    assert not store.exists(NAME)
    assert list(store.list("default/")) == []
    leftover = list((tmp_path / ".unfinished").iterdir())
    assert len(leftover) == 1
    os.utime(leftover[0], (0, 0))
    DiskStore(tmp_path)
    assert not list((tmp_path / ".unfinished").iterdir())


@pytest.mark.parametrize("name", ["../other/x", "a/../../x", "/etc/x"])
def test_no_name_leads_out_of_the_store(tmp_path: Path, name: str) -> None:
    store = DiskStore(tmp_path / "store")
    for act in (store.read, store.size, lambda name: store.write(name, [b"x"]), lambda name: store.delete([name])):
        with pytest.raises(StoreError, match="no name of anything"):
            act(name)


def test_full_disk(full_disk: Path) -> None:
    store = DiskStore(full_disk)
    store.write(NAME, [b"x" * 1000])
    with pytest.raises(StoreError, match="the disk is full"):
        store.write("default/model/cd/cdef/0000.raw.v1", [b"x" * (2 << 20)])
    assert list(store.list("default/")) == [NAME]
    assert not list((full_disk / ".unfinished").iterdir())
    read = store.read(NAME)
    assert read is not None and len(read) == 1000


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written to"):
        DiskStore(tmp_path / "file" / "kv")


def test_folder_without_write_permission(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    store = DiskStore(folder)
    assert store.read(NAME) is None and list(store.list("default/")) == []
    with pytest.raises(StoreError, match="cannot be written to"):
        store.write(NAME, [b"one"])
