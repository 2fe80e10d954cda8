"""Whose KV a store holds."""

from __future__ import annotations

import uuid

from lmcache_rag.blobs.base import Store
from lmcache_rag.chunk_kv import KVScope


def scopes_of(store: Store) -> list[KVScope]:
    """The namespaces and models that a store holds KV of. Raises `StoreError` where the store cannot be read."""
    namespaces = [name for name in store.folders("") if not name.startswith(".")]
    return [KVScope(namespace, model) for namespace in namespaces for model in store.folders(f"{namespace}/")]


def check_writable(store: Store) -> None:
    """Raises `StoreError` where the store cannot be written to."""
    name = f".probes/{uuid.uuid4().hex}"
    store.write(name, [b""])
    store.delete([name])


def recorded_scopes(store: Store) -> list[KVScope]:
    """The namespaces and models of which something is recorded, or was. Raises `StoreError` where the store cannot be
    read."""
    namespaces = store.folders(".records/")
    return [KVScope(namespace, model) for namespace in namespaces for model in store.folders(f".records/{namespace}/")]


def fingerprints_in(store: Store, namespace: str) -> set[str]:
    """The fingerprints of the models whose KV a namespace holds. Raises `StoreError` where the store cannot be read."""
    return {model for model in store.folders(f"{namespace}/") if store.folders(f"{namespace}/{model}/")}
