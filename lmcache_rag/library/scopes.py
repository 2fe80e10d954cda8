"""Whose KV a store holds."""

from __future__ import annotations

from lmcache_rag.blobs.base import Store


def fingerprints_in(store: Store, namespace: str) -> set[str]:
    """The fingerprints of the models whose KV a namespace holds. Raises `StoreError` where the store cannot be read."""
    return {model for model in store.folders(f"{namespace}/") if store.folders(f"{namespace}/{model}/")}
