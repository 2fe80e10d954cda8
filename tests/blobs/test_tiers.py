"""Caches in front of a store: what they save, how they are kept in bounds, and that none of them costs a request."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache_rag.bench.servers import RedisServer, S3Server
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.objects import ObjectStore
from lmcache_rag.blobs.redis import RedisStore
from lmcache_rag.blobs.tiers import Cache, TieredStore
from lmcache_rag.errors import StoreError
from tests.blobs.conftest import open_apart

NAME, OTHER = "default/model/ab/abcd/0000.raw.v1", "default/model/cd/cdef/0000.raw.v1"
SEGMENT, PART, LATEST = (f".records/default/model/{name}" for name in ("000001/00000001", "parts/000001.ab", "latest"))
TABLES = ".tables/model/000001.ab"


class Origin(DiskStore):
    """A disk that counts its reads, and fails as it is told; each read waits until it may go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []
        self.broken = False
        self.go_on = threading.Event()
        self.go_on.set()

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        self.reads.append(name)
        self.go_on.wait(60)
        if self.broken:
            raise StoreError("The origin is down.")
        return super().read(name, start, length)


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    return Origin(tmp_path / "origin")


@pytest.fixture
def disk(tmp_path: Path) -> Cache:
    return Cache("disk", DiskStore(tmp_path / "cache"))


@pytest.fixture
def tiers(origin: Origin, disk: Cache) -> TieredStore:
    return TieredStore([disk], origin)


def read(store: TieredStore, name: str, start: int = 0, length: int | None = None) -> bytes | None:
    data = store.read(name, start, length)
    return None if data is None else bytes(data)


def names(count: int) -> list[str]:
    return [f"default/model/{number:02}/{number:02}00/0.raw.v1" for number in range(count)]


def test_reads_fill_the_cache_and_are_counted(origin: Origin, disk: Cache, tiers: TieredStore) -> None:
    origin.write(NAME, [b"onetwo"])
    assert tiers.tier_of(NAME) is None
    assert read(tiers, NAME) == b"onetwo" and origin.reads == [NAME]
    tiers.flush()
    assert tiers.tier_of(NAME) == "disk" and disk.store.exists(NAME)
    assert read(tiers, NAME) == b"onetwo" and read(tiers, NAME, 2, 3) == b"etw" and origin.reads == [NAME]
    stats = tiers.stats()
    assert list(stats) == ["disk", "origin"]
    assert (stats["disk"].reads, stats["disk"].hits, stats["disk"].fills, stats["disk"].read_bytes) == (3, 2, 1, 9)
    assert (stats["origin"].reads, stats["origin"].hits, stats["origin"].read_bytes) == (1, 1, 6)
    assert stats["disk"].seconds > 0 and not stats["disk"].failures


def test_a_part_of_what_no_cache_has_is_read_alone(origin: Origin, tiers: TieredStore) -> None:
    origin.write(NAME, [b"onetwo"])
    assert read(tiers, NAME, 2, 3) == b"etw"
    tiers.flush()
    assert tiers.tier_of(NAME) is None and tiers.stats()["disk"].fills == 0


def test_writes_go_through_and_deletes_to_all(origin: Origin, disk: Cache, tiers: TieredStore) -> None:
    assert tiers.write(NAME, [b"one", b"two"]) == 6 and tiers.write_if_absent(OTHER, [b"x"])
    assert not tiers.write_if_absent(OTHER, [b"y"])
    assert read(tiers, NAME) == b"onetwo" and read(tiers, OTHER) == b"x" and not origin.reads
    assert origin.exists(NAME) and origin.exists(OTHER)
    tiers.delete([NAME, OTHER])
    assert not origin.exists(NAME) and not disk.store.exists(NAME) and tiers.tier_of(OTHER) is None


def test_what_cannot_be_stored_is_in_no_cache(
    origin: Origin, disk: Cache, tiers: TieredStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise StoreError("The origin is full.")

    with monkeypatch.context() as patched:
        patched.setattr(origin, "write", refuse)
        with pytest.raises(StoreError, match="full"):
            tiers.write(NAME, [b"one"])
    assert list(disk.store.list("default/")) == []
    tiers.write(NAME, [b"one"])
    assert list(disk.store.list("default/")) == [NAME]


@pytest.mark.parametrize(
    ("name", "cached"), [(SEGMENT, False), (LATEST, False), (PART, True), (TABLES, True), (".encrypted", False)]
)
def test_of_the_records_only_parts_are_cached(
    origin: Origin, disk: Cache, tiers: TieredStore, name: str, cached: bool
) -> None:
    tiers.write(name, [b"one"])
    assert disk.store.exists(name) is cached
    origin.write(name, [b"two"])  # by another machine
    tiers.delete([OTHER])
    assert read(tiers, name) == (b"one" if cached else b"two")
    mapped = tiers.map(name)
    assert mapped is not None and bytes(mapped) == (b"one" if cached else b"two")


def test_mapping_fills_the_cache(origin: Origin, disk: Cache, tiers: TieredStore) -> None:
    origin.write(PART, [b"x" * 5000])
    for _ in range(2):
        mapped = tiers.map(PART)
        assert mapped is not None and bytes(mapped) == b"x" * 5000
        tiers.flush()
    assert (tiers.stats()["origin"].reads, tiers.stats()["disk"].hits) == (1, 1)


def test_what_several_want_is_read_once(origin: Origin, tiers: TieredStore) -> None:
    origin.write(NAME, [b"onetwo"])
    origin.go_on.clear()
    with ThreadPoolExecutor(8) as pool:
        wanted = [pool.submit(read, tiers, NAME) for _ in range(8)]
        tiers.prefetch([NAME])
        origin.go_on.set()
        assert [each.result() for each in wanted] == [b"onetwo"] * 8
    tiers.flush()
    assert origin.reads == [NAME]
    origin.write(OTHER, [b"x"])
    assert tiers.prefetch([OTHER, OTHER, NAME, SEGMENT]) == 1
    tiers.flush()
    assert origin.reads == [NAME, OTHER] and tiers.tier_of(OTHER) == "disk"


def test_a_failure_is_told_to_all_who_wait(origin: Origin, tiers: TieredStore) -> None:
    origin.broken = True
    with ThreadPoolExecutor(4) as pool:
        wanted = [pool.submit(read, tiers, NAME) for _ in range(4)]
        for each in wanted:
            with pytest.raises(StoreError, match="The origin is down"):
                each.result()


def test_prefetching_is_bounded_and_fails_silently(origin: Origin, tiers: TieredStore) -> None:
    origin.broken = True
    assert tiers.prefetch(names(3)) == 3
    tiers.flush()
    origin.broken = False
    tiers = TieredStore(tiers.caches, origin)
    origin.go_on.clear()
    assert tiers.prefetch(f"default/model/aa/{number:04}/0.raw.v1" for number in range(2000)) == 512
    origin.go_on.set()
    tiers.flush()
    assert TieredStore([], origin).prefetch([NAME]) == 0


def test_an_origin_that_fails_is_left_alone_for_a_while(origin: Origin, disk: Cache) -> None:
    origin.write(OTHER, [b"x"])
    tiers = TieredStore([disk], origin, pause_s=1e9)
    assert read(tiers, OTHER) == b"x"
    tiers.flush()
    origin.broken = True
    for _ in range(5):
        with pytest.raises(StoreError, match="The origin is down"):
            read(tiers, NAME)
    assert origin.reads == [OTHER, NAME, NAME, NAME]  # then nobody waited for it
    assert read(tiers, OTHER) == b"x"  # from the cache
    again = TieredStore([], origin, pause_s=0.0)
    for _ in range(4):
        with pytest.raises(StoreError):
            read(again, NAME)
    origin.broken = False
    assert read(again, OTHER) == b"x"


def test_a_cache_stays_within_its_capacity_and_keeps_what_was_used_last(origin: Origin, tmp_path: Path) -> None:
    cache = Cache("disk", DiskStore(tmp_path / "cache"), 10_000)
    tiers = TieredStore([cache], origin)
    for name in names(10):
        tiers.write(name, [b"x" * 1000])
    assert tiers.stats()["disk"].evictions == 0 and cache.size_bytes == 10_000
    assert read(tiers, names(10)[0]) is not None  # used now
    tiers.write(names(11)[10], [b"x" * 1000])
    held = {name for name in names(11) if tiers.tier_of(name)}
    assert names(10)[0] in held and names(11)[10] in held and names(2)[1] not in held
    assert sum(size for _, size, _ in cache.store.entries()) == cache.size_bytes <= 10_000
    assert {name for name, _, _ in cache.store.entries()} == held
    assert tiers.stats()["disk"].evictions == 11 - len(held)
    tiers.write(NAME, [b"x" * 10_001])  # more than it has room for
    assert tiers.tier_of(NAME) is None and len(held) == len(list(cache.store.entries()))
    assert all(origin.exists(name) for name in [NAME, *names(11)])


def test_what_else_lies_in_a_caches_folder_is_left_alone(origin: Origin, tmp_path: Path) -> None:
    """It may be somebody's only copy: `--tier` may name any folder."""
    folder = tmp_path / "cache"
    others = [
        "thesis.md",
        ".records",
        "letters/2019/to-her.v2",
        "photos/ab/abcd/summer.jpg",
        ".ssh/id",
        "ab/abcd/draft.v1",
    ]
    for name in others:
        DiskStore(folder).write(name, [b"x" * 4000])
        os.utime(folder / name, (1, 1))  # used longest ago
    cache = Cache("disk", DiskStore(folder), 10_000)
    tiers = TieredStore([cache], origin)
    for name in names(12):
        tiers.write(name, [b"x" * 1000])
    assert tiers.stats()["disk"].evictions and 0 < cache.size_bytes <= 10_000
    assert all((folder / name).read_bytes() == b"x" * 4000 for name in others)


def test_a_folder_that_cannot_be_entered_keeps_no_cache_from_its_bounds(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as `lost+found` on a disk of its own."""
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    (tmp_path / "cache" / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", refusing)  # root may enter any folder
    cache = Cache("disk", DiskStore(tmp_path / "cache"), 10_000)
    tiers = TieredStore([cache], origin)
    for name in names(20):
        tiers.write(name, [b"x" * 1000])
    cache._scan()
    assert not tiers.stats()["disk"].failures and 0 < cache.size_bytes <= 10_000


def test_what_else_a_redis_holds(redis_server: RedisServer) -> None:
    """Values that have no length, and names that are no text."""
    import redis

    client = redis.Redis(port=redis_server.port, db=5)
    client.hset("sessions", "user", "7")
    client.set(b"\xff\x00", b"x")
    store = RedisStore("127.0.0.1", redis_server.port, 5)
    store.write(NAME, [b"onetwo"])
    assert [(name, size) for name, size, _ in store.entries()] == [(NAME, 6)]
    assert list(store.list("default/")) == [NAME]
    cache = Cache("redis", store, 1000)
    cache.fill(OTHER, [b"x" * 999])
    assert NAME not in store.list("") and client.hget("sessions", "user") == b"7" and client.get(b"\xff\x00") == b"x"
    client.flushdb()


def test_a_store_is_no_cache(origin: Origin, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else its only copies would be evicted."""
    other = DiskStore(tmp_path / "cache")
    for name in [*names(12), SEGMENT]:
        other.write(name, [b"x" * 1000])
    cache = Cache("disk", DiskStore(tmp_path / "cache"), 10_000)
    tiers = TieredStore([cache], origin)
    tiers.write(NAME, [b"x" * 1000])
    tiers.write(OTHER, [b"x" * 1000])
    assert all(other.exists(name) for name in names(12)) and not tiers.stats()["disk"].evictions
    assert "a store itself" in caplog.text
    tiers.delete([names(1)[0]])
    assert other.exists(names(1)[0]) and cache.read(names(1)[0]) is None


def test_what_another_process_filled_and_this_one_read_in_part_counts_whole(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "cache")
    cache = Cache("disk", DiskStore(tmp_path / "cache"), 10_000)
    cache.fill(names(1)[0], [b"x"])
    store.write(NAME, [b"x" * 6000])
    assert cache.read(NAME, 0, 100) is not None and cache.size_bytes == 101
    cache._scan()
    assert cache.size_bytes == 6001


def test_a_cache_is_known_again_after_a_restart(origin: Origin, tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "cache")
    for number, name in enumerate(names(10)):
        store.write(name, [b"x" * 1000])
        os.utime(tmp_path / "cache" / name, (number, number if name != names(1)[0] else 1000))
    cache = Cache("disk", DiskStore(tmp_path / "cache"), 10_000)
    tiers = TieredStore([cache], origin)
    tiers.write(NAME, [b"x" * 1000])
    held = [name for name in names(10) if tiers.tier_of(name)]
    assert held[0] == names(1)[0] and names(10)[9] in held and names(10)[1] not in held


def test_several_processes_keep_one_cache(origin: Origin, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from lmcache_rag.blobs import tier\n"
        "from lmcache_rag.blobs.disk import DiskStore\n"
        "from lmcache_rag.blobs.tiers import Cache, TieredStore\n"
        "tier._SCAN_S = 0.0\n"
        "root, start = Path(sys.argv[1]), int(sys.argv[2])\n"
        "store = TieredStore([Cache('disk', DiskStore(root / 'cache'), 40_000)], DiskStore(root / 'origin'))\n"
        "for number in range(start, 400, 3):\n"
        "    name = f'default/model/{number % 90:02}/{number % 90:02}00/0.raw.v1'\n"
        "    found = store.read(name)\n"
        "    if found is None: store.write(name, [bytes([number % 90]) * 1000])\n"
        "    else: assert bytes(found) == bytes([number % 90]) * 1000\n"
        "    store.flush()\n"
        "assert not store.stats()['disk'].failures, store.stats()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(start)]) for start in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    store = DiskStore(tmp_path / "cache")
    assert sum(size for _, size, _ in store.entries()) <= 40_000 + 3 * 40_000 // 32 + 3 * 1000
    for name, size, _ in store.entries():
        assert size == 1000 and origin.exists(name)


@pytest.fixture(params=["a file", "full", "read-only"])
def broken_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Cache]]:
    """A cache that works, and then breaks when this is called."""
    folder = request.getfixturevalue("full_disk") if request.param == "full" else tmp_path / "cache"
    cache = Cache("disk", DiskStore(folder), pause_s=0.0)
    cache._scanned.wait()

    def broken() -> Cache:
        if request.param == "a file":
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            folder.rmdir()
            folder.write_text("")
        elif request.param == "full":
            (folder / "other").write_bytes(b"x" * (900 << 10))
        else:
            if os.getuid() == 0:
                pytest.skip("root may write everywhere")
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o500)
        return cache

    yield broken
    for path in [folder, *folder.rglob("*")] if folder.is_dir() else []:
        path.chmod(0o700)


def test_a_cache_that_breaks_costs_nobody_anything(
    broken_cache: Callable[[], Cache], origin: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    cache = broken_cache()
    tiers = TieredStore([cache], origin)
    content = os.urandom(300 << 10)
    for name in names(3):
        assert tiers.write(name, [content]) == len(content)
        assert read(tiers, name) == content
        tiers.flush()
    tiers.delete(names(1))
    assert not origin.exists(names(1)[0])
    assert cache.stats.failures >= 3 and cache.stats.fills == 0
    assert sum("failed, and is tried again later" in line for line in caplog.messages) <= 2  # reading and writing


def test_a_damaged_copy_is_healed_and_a_damaged_origin_is_told(origin: Origin, disk: Cache, tiers: TieredStore) -> None:
    tiers.write(NAME, [b"onetwo"])
    disk.store.write(NAME, [b"damaged"])
    behind = tiers.heal(NAME)
    assert behind is origin and not disk.store.exists(NAME) and origin.exists(NAME)
    assert tiers.stats()["disk"].healed == 1 and read(tiers, NAME) == b"onetwo"
    assert DiskStore(origin.root).heal(NAME) is None
    assert TieredStore([], origin).heal(NAME) is None


def test_a_hit_in_a_slower_cache_fills_the_faster(origin: Origin, disk: Cache, tmp_path: Path) -> None:
    slower = Cache("site", DiskStore(tmp_path / "site"))
    slower.store.write(NAME, [b"onetwo"])
    tiers = TieredStore([disk, slower], origin)
    assert read(tiers, NAME) == b"onetwo" and not origin.reads
    tiers.flush()
    assert tiers.tier_of(NAME) == "disk" and disk.store.exists(NAME)


def test_a_cache_that_evicts_by_itself(s3_server: S3Server, tmp_path: Path) -> None:
    """Redis with a memory limit in front of S3: what it has dropped is read again."""
    if not RedisServer.is_there():
        pytest.skip("needs redis-server")
    server = RedisServer(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru", "--appendonly", "no")
    try:
        tiers = open_apart(s3_server.uri("evicting"), [server.uri("evicting")])
        contents = {name: os.urandom(500 << 10) for name in names(16)}
        for name, content in contents.items():
            tiers.write(name, [content])
        for name, content in contents.items():
            assert read(tiers, name) == content
        tiers.flush()
        label = tiers.caches[0].label
        stats = tiers.stats()[label]
        assert stats.hits + stats.fills - len(contents) > 0 and stats.hits < stats.reads and not stats.failures
        assert read(tiers, names(16)[15], 10, 20) == contents[names(16)[15]][10:30]
    finally:
        server.kill()


def test_a_cache_that_is_killed_and_comes_back(origin: Origin, tmp_path: Path) -> None:
    if not RedisServer.is_there():
        pytest.skip("needs redis-server")
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    try:
        cache = Cache("redis", RedisStore("127.0.0.1", server.port), pause_s=0.0)
        tiers = TieredStore([cache], origin)
        tiers.write(NAME, [b"onetwo"])
        assert read(tiers, NAME) == b"onetwo" and not origin.reads
        server.kill()
        assert read(tiers, NAME) == b"onetwo" and tiers.write(OTHER, [b"x"]) == 1
        assert read(tiers, OTHER, 0, 1) == b"x" and origin.reads == [NAME, OTHER]
        tiers.delete([OTHER])
        tiers.flush()
        assert cache.stats.failures >= 4 and not origin.exists(OTHER)
        server.start()
        tiers.write(OTHER, [b"y"])
        assert read(tiers, OTHER) == b"y" and read(tiers, NAME) == b"onetwo" and origin.reads == [NAME, OTHER]
    finally:
        server.kill()


def test_memory_as_a_cache(s3_server: S3Server) -> None:
    from obstore.store import MemoryStore

    cache = Cache("memory", ObjectStore(MemoryStore(), "memory", remote=False), 2000)
    tiers = TieredStore([cache], open_apart(s3_server.uri("memory")))
    for name in names(4):
        tiers.write(name, [name.encode() * 20])
    assert all(read(tiers, name) == name.encode() * 20 for name in names(4))
    tiers.flush()
    assert 0 < cache.size_bytes <= 2000
