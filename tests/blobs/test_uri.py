"""URIs of stores: what each means, and what is refused in words that repeat no secrets."""

from __future__ import annotations

import builtins
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from lmcache_rag.bench.servers import RedisServer, S3Server
from lmcache_rag.blobs import uri as module
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.tiers import TieredStore
from lmcache_rag.blobs.uri import open_store, parse, resolved
from lmcache_rag.engine import EngineSettings
from lmcache_rag.errors import EngineError, StoreError
from lmcache_rag.vllm.config import ConnectorConfig


@pytest.mark.parametrize(
    ("uri", "scheme", "host", "path"),
    [
        ("/var/kv", "file", "", "/var/kv"),
        ("kv", "file", "", "kv"),
        ("~/kv", "file", "", "~/kv"),
        ("./a:b", "file", "", "./a:b"),
        ("file:///var/my%20kv", "file", "", "/var/my kv"),
        ("s3://bucket/some/prefix/", "s3", "bucket", "some/prefix"),
        ("S3://bucket", "s3", "bucket", ""),
        ("s3://b?endpoint=http://127.0.0.1:9000", "s3", "b", ""),
        ("gs://bucket/p", "gs", "bucket", "p"),
        ("az://container/p", "az", "container", "p"),
        ("redis://host", "redis", "host", ""),
        ("rediss://host:7000/3?prefix=kv/", "rediss", "host", "3"),
        ("redis://[::1]:7000/3", "redis", "::1", "3"),
        ("memory://", "memory", "", ""),
    ],
)
def test_what_they_mean(uri: str, scheme: str, host: str, path: str) -> None:
    found = parse(uri)
    assert (found.scheme, found.host, found.path, found.capacity_bytes) == (scheme, host, path, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("100GiB", 100 << 30), ("1.5GB", 1_500_000_000), ("7kb", 7000), ("2TiB", 2 << 40), ("12", 12), ("12B", 12)],
)
def test_capacities(text: str, size: int) -> None:
    assert parse(f"file:///var/cache?capacity={text}").capacity_bytes == size
    assert parse(f"/var/cache?capacity={text}").capacity_bytes == size
    assert parse(f"redis://host/0?capacity={text}&prefix=x").capacity_bytes == size


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "needs a name"),
        ("ftp://host/x", "ftp:// is no store: use file://"),
        ("s3:bucket/x", "put in the slashes"),
        ("s3:///x", "s3://bucket/prefix"),
        ("s3://bucket:80/x", "s3://bucket/prefix"),
        ("s3://bucket/x#y", "s3://bucket/prefix"),
        ("file://host/x", "three slashes"),
        ("redis://host:port/0", "redis://host:port/db"),
        ("redis:///0", "redis://host:port/db"),
        ("redis://host/zero", "redis://host:port/db"),
        ("rediss://host/0?prefx=x", "has no `prefx=`"),
        ("memory://a/b", "memory://name"),
        ("/var/cache?capacity=lots", "a size such as 100GiB"),
        ("file:///x?capacity=0", "a size such as 100GiB"),
    ],
)
def test_malformed(uri: str, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        parse(uri)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://KEY:hunter2@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x?secret_access_key=hunter2", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x?endpoint=http://me:hunter2@host", "AWS_ACCESS_KEY_ID"),
        ("gs://me:hunter2@bucket", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://bucket?sig=hunter2", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("redis://:hunter2@host/0", "LMCACHE_RAG_REDIS_PASSWORD"),
        ("rediss://host/0?password=hunter2", "LMCACHE_RAG_REDIS_PASSWORD"),
    ],
)
def test_credentials_are_refused_and_not_repeated(uri: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StoreError, match=f"holds credentials.*{says}") as refused:
        open_store(uri)
    with pytest.raises(EngineError, match=f"^store: .*{says}") as setting:
        EngineSettings.checked(store=uri)
    with pytest.raises(ValueError, match=says) as field:
        ConnectorConfig(store="kv", tiers=(uri,))
    assert "hunter2" not in f"{refused.value}{setting.value}{field.value}{caplog.text}"


def test_settings_name_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"^store: ftp:// is no store"):
        EngineSettings.checked(store="ftp://x")
    with pytest.raises(EngineError, match=r"^tiers.1: capacity= is a size"):
        EngineSettings.checked(tiers=("/fast", "/slow?capacity=much"))
    with pytest.raises(EngineError, match=r"^store: capacity= is for caches"):
        EngineSettings.checked(store="/kv?capacity=1GB")
    monkeypatch.setenv("LMCACHE_RAG_TIERS", '["/fast?capacity=1GB"]')
    monkeypatch.setenv("LMCACHE_RAG_REDIS_PASSWORD", "x")
    settings = EngineSettings.checked(store=Path("some") / "folder")
    assert (settings.store, settings.tiers) == ("some/folder", ("/fast?capacity=1GB",))


def test_a_plain_path_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in ("~/kv", tmp_path / "kv", f"file://{tmp_path}/kv"):
        store = open_store(uri)
        assert isinstance(store, DiskStore) and store.root == tmp_path / "kv"
    assert resolved("kv", Path("/index")) == "/index/kv" and resolved("s3://b/kv", Path("/index")) == "s3://b/kv"


def test_all_in_a_process_share_a_store_with_tiers(tmp_path: Path) -> None:
    tiers = [f"{tmp_path}/cache"]
    one, two = (open_store(tmp_path / "kv", tiers) for _ in range(2))
    assert one is two and isinstance(one, TieredStore) and not one.remote
    assert open_store(tmp_path / "kv", [f"{tmp_path}/other"]) is not one


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "obstore" else found(name))
    with pytest.raises(StoreError, match=r"pip install 'lmcache-rag\[s3\]'"):
        open_store("s3://bucket/x")
    imported = builtins.__import__

    def without_redis(name: str, *arguments: Any) -> Any:
        if name.startswith("redis"):
            raise ImportError(name)
        return imported(name, *arguments)

    for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_redis)
    with pytest.raises(StoreError, match=r"pip install 'lmcache-rag\[redis\]'"):
        open_store("redis://host")


def test_the_endpoint_from_the_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}")
    store = open_store("s3://kv-bucket/from-environment")
    store.write("a/b", [b"one"])
    assert bytes(open_store(s3_server.uri("from-environment")).read("a/b") or b"") == b"one"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@127.0.0.1")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL of an s3:// store is http") as refused:
        open_store("s3://kv-bucket/another")
    assert "hunter2" not in str(refused.value)


def test_a_redis_server_that_asks_for_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not RedisServer.is_there():
        pytest.skip("needs redis-server")
    server = RedisServer(tmp_path, "--requirepass", "hunter2")
    try:
        with pytest.raises(StoreError, match="set LMCACHE_RAG_REDIS_PASSWORD"):
            open_store(server.uri("none")).write("a/b", [b"one"])
        monkeypatch.setenv("LMCACHE_RAG_REDIS_PASSWORD", "hunter3")
        with pytest.raises(StoreError, match="refuses this one") as refused:
            open_store(server.uri("wrong")).read("a/b")
        assert "hunter" not in str(refused.value)
        monkeypatch.setenv("LMCACHE_RAG_REDIS_PASSWORD", "hunter2")
        store = open_store(server.uri("right"))
        assert store.write("a/b", [b"one"]) == 3 and store.exists("a/b")
    finally:
        server.kill()
