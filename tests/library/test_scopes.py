"""Whose KV a store holds, and the warning where it is only others'."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.throttled import Throttle, ThrottledStore
from lmcache_rag.library.scopes import fingerprints_in
from lmcache_rag.vllm.connector import _warn_of_others


def test_fingerprints_of_a_namespace(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    assert fingerprints_in(store, "default") == set()
    store.write("default/one/aa/aa/name", [b"1"])
    store.write("default/two/aa/aa/name", [b"1"])
    store.write("other/three/aa/aa/name", [b"1"])
    assert fingerprints_in(store, "default") == {"one", "two"}
    assert fingerprints_in(ThrottledStore(store, Throttle(1e9)), "other") == {"three"}


@pytest.mark.parametrize(("mine", "warned"), [("one", False), ("three", True)])
def test_a_store_of_others_kv_only_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mine: str, *, warned: bool
) -> None:
    store = DiskStore(tmp_path)
    with caplog.at_level(logging.WARNING, "lmcache_rag"):
        _warn_of_others(store, "default", mine)  # an empty store is nobody's
        assert not caplog.text
        store.write("default/one/aa/aa/name", [b"1"])
        store.write("default/two/aa/aa/name", [b"1"])
        _warn_of_others(store, "default", mine)
    assert ("KV of 2 other models or compute types and none of this one" in caplog.text) == warned
