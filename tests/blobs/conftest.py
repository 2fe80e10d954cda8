"""Stores of every kind, empty, on real servers."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lmcache_rag.blobs import uri
from lmcache_rag.blobs.base import Store
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.objects import ObjectStore
from lmcache_rag.blobs.tiers import TieredStore
from lmcache_rag.blobs.uri import open_store

KINDS = ("disk", "s3", "memory", "files", "redis", "disk over s3", "disk over redis", "redis over s3")

Opener = Callable[[], Store]
"""Opens the same store again, as another process would."""


def opener(kind: str, folder: Path, request: pytest.FixtureRequest) -> Opener:
    """What opens a new store of a kind."""
    if kind == "disk":
        return lambda: DiskStore(folder / "kv")
    if kind == "memory":
        name = uuid.uuid4().hex
        return lambda: open_store(f"memory://{name}")
    if kind == "files":
        from obstore.store import LocalStore

        return lambda: ObjectStore(LocalStore(folder / "kv", mkdir=True), "files", remote=False)
    tier, _, origin = kind.rpartition(" over ")
    uris = {}
    for each in filter(None, (tier, origin)):
        if each == "disk":
            uris[each] = f"file://{folder}/cache?capacity=1GB"
        else:
            uris[each] = request.getfixturevalue(f"{each}_server").uri(uuid.uuid4().hex)
    return lambda: open_apart(uris[origin], [uris[tier]] if tier else [])


def open_apart(store: str, tiers: Sequence[str] = ()) -> TieredStore:
    """A store as another process would open it: shared with nobody."""
    uri._tiered.clear()
    opened = open_store(store, tiers)
    uri._tiered.clear()
    assert isinstance(opened, TieredStore)
    return opened


@pytest.fixture(params=KINDS)
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    return opener(request.param, tmp_path, request)


@pytest.fixture
def store(open_again: Opener) -> Store:
    return open_again()
