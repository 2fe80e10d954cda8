"""Services that fail: each failure is a `StoreError` that says what to do, and is over when it is over."""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path

import pytest

from lmcache_rag.bench.servers import BUCKET, RedisServer, free_port
from lmcache_rag.blobs.objects import ObjectStore, client_options, retry_config
from lmcache_rag.blobs.redis import LARGEST_BYTES, RedisStore
from lmcache_rag.chunk_kv import KVScope
from lmcache_rag.errors import StoreError
from lmcache_rag.records.records import Records
from tests.records.test_records import known, save
from tests.servers import FaultyProxy
from tests.test_process import in_a_fork

NAME = "default/model/ab/abcd/0000.raw.v1"


def s3(port: int, silence_s: float = 1.0) -> ObjectStore:
    from obstore.store import S3Store

    bucket = S3Store(
        BUCKET,
        prefix=uuid.uuid4().hex,
        endpoint=f"http://127.0.0.1:{port}",
        client_options=client_options(allow_http=True, silence_s=silence_s),
        retry_config=retry_config(silence_s),
    )
    return ObjectStore(bucket, f"s3://{BUCKET}/x")


FAULTS = {
    "hang": "error sending request",
    500: "500",
    503: "503",
    403: "access is denied: check the credentials",
    501: "refuses conditional writes",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_s3_that_fails(faulty_s3: FaultyProxy, fault: int | str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = s3(faulty_s3.port, 0.5 if fault == "hang" else 1.0)
    store.write(NAME, [b"onetwo"])
    faulty_s3.fault = lambda method, path: fault
    told = []
    for failing in (
        lambda: store.write(NAME, [b"x"]),
        lambda: store.write_if_absent(NAME, [b"x"]),
        lambda: store.read(NAME),
        lambda: store.read(NAME, 1, 2),
        lambda: store.map(NAME),
        lambda: store.exists(NAME),
        lambda: store.size(NAME),
        lambda: store.delete([NAME]),
        lambda: list(store.list("default/")),
        lambda: store.folders("default/"),
    ):
        with pytest.raises(StoreError, match=r"could not be .* in s3://kv-bucket/x: ") as error:
            failing()
        told.append(str(error.value))
    assert any(FAULTS[fault] in line for line in told), told
    assert "hidden-secret" not in f"{told}{caplog.text}" and "Debug source" not in f"{told}"
    faulty_s3.fault = lambda method, path: None
    read = store.read(NAME)
    assert read is not None and bytes(read) == b"onetwo"


def test_a_body_that_is_cut_is_asked_for_again_or_fails(faulty_s3: FaultyProxy) -> None:
    store, content = s3(faulty_s3.port), os.urandom(100_000)
    store.write(NAME, [content])
    faulty_s3.fault = lambda method, path: "cut" if method == "GET" else None
    for cut in (lambda: store.read(NAME), lambda: store.read(NAME, 10, 50_000), lambda: store.map(NAME)):
        try:
            data = cut()
        except StoreError:
            continue
        assert data is not None and bytes(data) in (content, content[10:50_010])
    once = iter(["cut"])
    faulty_s3.fault = lambda method, path: next(once, None)
    read = store.read(NAME)
    assert read is not None and bytes(read) == content


def test_what_is_over_soon_is_not_noticed(faulty_s3: FaultyProxy) -> None:
    store = s3(faulty_s3.port)
    faults = iter([503, 500])
    faulty_s3.fault = lambda method, path: next(faults, None)
    assert store.write(NAME, [b"one"]) == 3
    assert [method for method, _ in faulty_s3.requests] == ["PUT"] * 3


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(StoreError, match="Check that the service is there"):
        s3(free_port()).read(NAME)
    with pytest.raises(StoreError, match="Check that the server is there"):
        RedisStore("127.0.0.1", free_port(), shown="redis://x").read(NAME)


def test_a_server_that_says_nothing() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = RedisStore("127.0.0.1", silent.getsockname()[1], shown="redis://x", silence_s=0.3)
        with pytest.raises(StoreError, match=r"could not be read in redis://x"):
            store.read(NAME)


def test_redis_that_is_killed_and_started_again(tmp_path: Path) -> None:
    if not RedisServer.is_there():
        pytest.skip("needs redis-server")
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    store, scope = RedisStore("127.0.0.1", server.port, shown="redis://x"), KVScope("default", "f" * 32)
    try:
        store.write(NAME, [b"one"])
        records = Records(store, scope)
        save(records, 0)
        server.kill()
        for failing in (
            lambda: store.read(NAME),
            lambda: store.write(NAME, [b"x"]),
            lambda: store.write_if_absent(NAME, [b"x"]),
            lambda: list(store.list("default/")),
            lambda: store.delete([NAME]),
            lambda: save(records, 1),
        ):
            with pytest.raises(StoreError, match=r"could not be .* in redis://x"):
                failing()
        server.start()
        read = store.read(NAME)
        assert read is not None and bytes(read) == b"one"
        save(records, 1)
        assert known(Records(store, scope), 2) == [0, 1]
    finally:
        server.kill()


def test_redis_that_is_full(tmp_path: Path) -> None:
    if not RedisServer.is_there():
        pytest.skip("needs redis-server")
    server = RedisServer(tmp_path, "--maxmemory", "2mb")
    try:
        store = RedisStore("127.0.0.1", server.port, shown="redis://x")
        with pytest.raises(StoreError, match="its memory is full: raise its maxmemory"):
            for number in range(8):
                store.write(f"{NAME}{number}", [b"x" * (1 << 20)])
    finally:
        server.kill()


def test_what_is_too_large_for_redis_is_refused_in_words() -> None:
    import mmap

    store = RedisStore("127.0.0.1", free_port())
    with (
        mmap.mmap(-1, LARGEST_BYTES + 1) as much,  # of which nothing is touched
        memoryview(much) as view,
        pytest.raises(StoreError, match="Redis takes 537 MB at most: keep what is so large in object storage"),
    ):
        store.write(NAME, [view])


def test_a_client_is_of_no_use_in_a_fork(faulty_s3: FaultyProxy) -> None:
    store = s3(faulty_s3.port)
    assert store.read(NAME) is None
    assert in_a_fork(lambda: store.read(NAME)).startswith("StoreError: The client of an object store belongs to")
    assert store.read(NAME) is None
