"""Whose KV a store holds."""

from __future__ import annotations

from pathlib import Path

from lmcache_rag.blobs.base import Store
from lmcache_rag.errors import StoreError


def fingerprints_in(store: Store, namespace: str) -> set[str]:
    """The fingerprints of the models whose KV a namespace holds; none where the store cannot tell at little cost.

    Raises:
        StoreError: the store cannot be read.
    """
    root: Path | None = getattr(store, "root", None)
    if root is None:
        return set()
    try:
        return {folder.name for folder in (root / namespace).iterdir() if any(folder.iterdir())}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise StoreError(f"{root / namespace} cannot be listed ({error.strerror}): change its permissions.") from error
