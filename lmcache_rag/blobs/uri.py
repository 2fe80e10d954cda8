"""Where a store is: one URI each, or a folder.

    /path, file:///path             a folder
    s3://bucket/prefix              Amazon S3, or what speaks its protocol at ?endpoint=https://... or AWS_ENDPOINT_URL
    gs://bucket/prefix, az://container/prefix
    redis://host:port/db?prefix=    Redis or Valkey; rediss:// with TLS
    memory://name                   of this process, gone with it

A cache in front of a store may say its `?capacity=100GiB`. Credentials come from the environment, never from a URI.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit
from weakref import WeakValueDictionary

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from lmcache_rag.blobs.base import CacheStore, Store
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.blobs.encrypted import key_from_environment, opened_as_marked
from lmcache_rag.blobs.redis import PASSWORD_VARIABLE, USERNAME_VARIABLE, RedisStore
from lmcache_rag.errors import StoreError
from lmcache_rag.request import SECRET_INPUT

if TYPE_CHECKING:
    from obstore.store import MemoryStore, S3Store

_BUCKETS = ("s3", "gs", "az")
_SCHEMES = ("file", *_BUCKETS, "redis", "rediss", "memory")
_QUERY = {"s3": ("endpoint",), "redis": ("prefix",), "rediss": ("prefix",)}
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{end}": base**power
    for end, base in (("b", 1000), ("ib", 1024))
    for power, letter in enumerate("kmgt", start=1)
}
_DEFAULT_PREFIX = "lmcache-rag/"

_CACHE_SILENCE_S = 1.0
"""A cache over a network that takes longer to answer is none."""


@dataclass(frozen=True)
class Location:
    """A URI that was understood.

    Attributes:
        shown: the URI without its query, which errors and statistics call the store.
        host: bucket, container, server, or name in memory.
        path: a folder, or without its first `/` the prefix in a bucket.
    """

    scheme: str
    shown: str
    host: str = ""
    path: str = ""
    port: int = 6379
    query: dict[str, str] = field(default_factory=dict)
    capacity_bytes: int | None = None


def is_folder(uri: str | Path) -> bool:
    """Whether this is a plain path."""
    return not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(uri))


def _checked_store(value: Any) -> str:
    if _checked_tier(value) and parse(_text(value)).capacity_bytes is not None:
        raise _problem("capacity= is for caches (--tier): a store keeps everything until it is deleted.")
    return _text(value)


def _checked_tier(value: Any) -> str:
    try:
        parse(_text(value))
    except StoreError as error:
        raise _problem(str(error)) from None
    return _text(value)


def _problem(problem: str) -> PydanticCustomError:
    """For settings, whose errors do not repeat the value, since it may hold credentials."""
    return PydanticCustomError(SECRET_INPUT, "{problem}", {"problem": problem})


StoreURI = Annotated[str, BeforeValidator(_checked_store)]
"""A field that takes a folder or a URI, and keeps it as text."""

TierURI = Annotated[str, BeforeValidator(_checked_tier)]


def parse(uri: str) -> Location:
    """What a URI says.

    Raises:
        StoreError: it is malformed or holds credentials, which the message does not repeat.
    """
    if is_folder(uri):
        scheme = uri.partition(":")[0]
        if ":" in uri and scheme in _SCHEMES:
            raise StoreError(f"A store's URI begins with `{scheme}://`: put in the slashes, or `./` before a path.")
        path, _, capacity = uri.partition("?capacity=")
        if not path:
            raise StoreError("A store needs a name: a folder, or a URI such as s3://bucket/prefix.")
        return Location("file", path, path=path, capacity_bytes=_bytes(capacity) if capacity else None)
    scheme, _, rest = uri.partition("://")
    scheme = scheme.lower()
    if scheme not in _SCHEMES:
        raise StoreError(f"{scheme}:// is no store: use {', '.join(f'{each}://' for each in _SCHEMES)} or a folder.")
    try:
        split = urlsplit(f"{scheme}://{rest}")
        port = split.port
        query = dict(parse_qsl(split.query, keep_blank_values=True, strict_parsing=bool(split.query)))
    except ValueError:
        raise StoreError(f"The {scheme}:// URI of the store is malformed: {_form(scheme)}.") from None
    _refuse_credentials(split, query)
    capacity = query.pop("capacity", "")
    if unknown := set(query) - set(_QUERY.get(scheme, ())):
        raise StoreError(f"A {scheme}:// store has no `{min(unknown)}=`: {_form(scheme)}.")
    path = unquote(split.path)
    host = (split.hostname or "") if scheme in ("redis", "rediss") else unquote(split.netloc)
    fits = {
        "file": not split.netloc and len(path) > 1,
        "redis": bool(host) and bool(re.fullmatch(r"/?\d*", path)),
        "memory": path in ("", "/"),
    }
    fits["rediss"] = fits["redis"]
    if not fits.get(scheme, bool(host) and port is None) or split.fragment:
        raise StoreError(f"The {scheme}:// URI of the store is malformed: {_form(scheme)}.")
    return Location(
        scheme,
        f"{scheme}://{split.netloc}{path}",
        host,
        path if scheme == "file" else path.strip("/"),
        port or 6379,
        query,
        _bytes(capacity) if capacity else None,
    )


def open_store(uri: str | Path, tiers: Sequence[str] = ()) -> Store:
    """The store that a URI names; where it is slow or `tiers` are named, `TieredStore` over it, which all in a process
    share who name the same. Where the operator has set a key, all that is in it is encrypted.

    Args:
        tiers: URIs of caches in front of it, fastest first.

    Raises:
        StoreError: a URI is no store's, a package is missing, or a folder cannot be written to.
    """
    from lmcache_rag.blobs.tiers import Cache, TieredStore

    location, encryption_key = parse(str(uri)), key_from_environment()

    def sealed(store: Store) -> Store:
        return opened_as_marked(store, encryption_key)

    if location.scheme in ("file", "memory") and not tiers:
        return sealed(_opened(location))
    key = (os.getpid(), encryption_key, str(uri), *map(str, tiers))
    with _lock:
        store = _tiered.get(key)
        if store is None:
            caches = [parse(str(tier)) for tier in tiers]
            store = sealed(
                TieredStore(
                    [Cache(cache.shown, _opened(cache, _CACHE_SILENCE_S), cache.capacity_bytes) for cache in caches],
                    _opened(location),
                    location.shown,
                )
            )
            _tiered[key] = store
        return store


def open_existing(location: str) -> Store:
    """The store that a command names. Raises `StoreError` where there is none, or it cannot be opened."""
    if is_folder(location) and not Path(location).expanduser().is_dir():
        raise StoreError(f"There is no store in {location}: name the folder or URI that --store named, or INDEX/kv.")
    return open_store(location)


def resolved(store: str, base: Path) -> str:
    """A store that is named from within a folder: a relative path begins there, a URI and `~` do not."""
    return store if not is_folder(store) else str(base / Path(store).expanduser())


_lock = threading.Lock()
_tiered: WeakValueDictionary[tuple[Any, ...], Store] = WeakValueDictionary()
_memories: dict[str, MemoryStore] = {}


def _opened(location: Location, silence_s: float = 5.0) -> CacheStore:
    if location.scheme == "file":
        return DiskStore(location.path)
    if location.scheme in ("redis", "rediss"):
        return RedisStore(
            location.host,
            location.port,
            int(location.path or 0),
            prefix=location.query.get("prefix", _DEFAULT_PREFIX),
            tls=location.scheme == "rediss",
            shown=location.shown,
            silence_s=silence_s,
        )
    if importlib.util.find_spec("obstore") is None:
        raise StoreError(f"{location.scheme}:// needs one more package: pip install 'lmcache-rag[s3]'.")
    from obstore.store import AzureStore, GCSStore, MemoryStore

    from lmcache_rag.blobs.objects import ObjectStore, client_options, retry_config

    if location.scheme == "memory":
        return ObjectStore(_memories.setdefault(location.host, MemoryStore()), location.shown, remote=False)
    makers: dict[str, Callable[..., Any]] = {"s3": _s3, "gs": GCSStore, "az": AzureStore}
    endpoint = _endpoint(location) if location.scheme == "s3" else ""
    given: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    try:
        bucket = makers[location.scheme](
            location.host,
            prefix=location.path or None,
            client_options=client_options(allow_http=endpoint.startswith("http://"), silence_s=silence_s),
            retry_config=retry_config(silence_s),
            **given,
        )
    except Exception as error:  # noqa: BLE001  # of any package in the chain of credentials
        raise StoreError(
            f"{location.shown} cannot be opened ({type(error).__name__}): check what the environment says of its "
            "account, region and credentials."
        ) from None
    return ObjectStore(bucket, location.shown)


def _s3(bucket: str, **options: Any) -> S3Store:
    """With the credentials of the environment, else, where boto3 is installed, of AWS' own chain, as profiles."""
    from obstore.store import S3Store

    if "AWS_ACCESS_KEY_ID" not in os.environ and importlib.util.find_spec("boto3") is not None:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider

        session = boto3.Session()
        if session.get_credentials() is not None:
            region = {} if session.region_name is None else {"region": session.region_name}
            return S3Store(bucket, credential_provider=Boto3CredentialProvider(session), **region, **options)
    return S3Store(bucket, **options)


def _endpoint(location: Location) -> str:
    """Of a service other than Amazon's; without TLS only where it says http://."""
    named = location.query.get("endpoint", "")
    endpoint = named or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint and (not re.match(r"https?://[^/@?]+/?$", endpoint)):
        where = "endpoint=" if named else "AWS_ENDPOINT_URL"
        raise StoreError(f"{where} of an s3:// store is http://host:port or https://host:port, without credentials.")
    return endpoint.rstrip("/")


def _refuse_credentials(split: SplitResult, query: dict[str, str]) -> None:
    secret = re.compile(r"pass|secret|token|key|sig|credential|user", re.IGNORECASE)
    if "@" in split.netloc or any(secret.search(name) for name in query) or "@" in query.get("endpoint", ""):
        where = {
            "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            "gs": "GOOGLE_APPLICATION_CREDENTIALS",
            "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
        }.get(split.scheme, f"{USERNAME_VARIABLE} and {PASSWORD_VARIABLE}")
        raise StoreError(
            f"The {split.scheme}:// URI of the store holds credentials, which others could read in process lists and "
            f"logs: take them out, and set {where} in the environment."
        )


def _form(scheme: str) -> str:
    forms = {
        "file": "it is file:///path, with three slashes",
        "redis": "it is redis://host:port/db?prefix=NAME/",
        "rediss": "it is rediss://host:port/db?prefix=NAME/",
        "s3": "it is s3://bucket/prefix?endpoint=https://host:port",
        "memory": "it is memory://name",
    }
    return forms.get(scheme, f"it is {scheme}://bucket/prefix")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2].lower() not in _UNITS or not float(found[1]):
        raise StoreError("capacity= is a size such as 100GiB, 500MB, or a number of bytes.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _text(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise StoreError("A store is a folder, or a URI such as s3://bucket/prefix.")
    text = os.fsdecode(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise StoreError("The store has a name that is not UTF-8: rename it, or name another one.") from None
    return text


def _forget_lock() -> None:
    """Another thread may have held the lock when this process was forked."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
