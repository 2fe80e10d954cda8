"""Blobs as objects of a bucket, by obstore: Amazon S3 and what speaks its protocol, Google Cloud Storage, Azure."""

from __future__ import annotations

import mmap
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, BinaryIO

from lmcache_rag.blobs.base import Untiered
from lmcache_rag.errors import StoreError
from lmcache_rag.process import OwnProcess

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig
    from obstore.store import ObjectStore as Bucket

_PART_BYTES = 8 << 20
"""Larger blobs are uploaded in parts of this size."""

_AT_A_TIME = 4
"""So many parts at once, so that each is there in time also where the line is slow."""

_TOLD = {
    "NotSupportedError": "the service refuses conditional writes (If-None-Match), which the records need: use a "
    "service or a release that has them, as Amazon S3, MinIO, Google Cloud Storage and Azure do",
    "PermissionDeniedError": "access is denied: check the credentials in the environment, and what they may do",
    "UnauthenticatedError": "the credentials are refused: check those in the environment",
}


def client_options(*, allow_http: bool = False, silence_s: float = 5.0) -> ClientConfig:
    """How long a service is waited for: a dead one fails within seconds, and a slow one may take its time.

    Args:
        allow_http: whether the connection may be without TLS.
        silence_s: how long it may send nothing.
    """
    return {
        "allow_http": allow_http,
        "connect_timeout": timedelta(seconds=min(2.0, silence_s)),
        "read_timeout": timedelta(seconds=silence_s),
        "timeout": timedelta(minutes=5),
    }


def retry_config(silence_s: float = 5.0) -> RetryConfig:
    """A few tries, none begun later than `silence_s` after the first."""
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2}
    return {"max_retries": 3, "retry_timeout": timedelta(seconds=silence_s), "backoff": backoff}  # type: ignore[typeddict-item]


class ObjectStore(Untiered):
    """One object a blob, below a prefix that the bucket has.

    Args:
        bucket: any of obstore's stores.
        shown: what errors call it: never with credentials.
        remote: see `Store`.
    """

    def __init__(self, bucket: Bucket, shown: str, *, remote: bool = True) -> None:
        self.remote = remote
        self._bucket = bucket
        self._shown = shown
        self._process = OwnProcess("The client of an object store", StoreError)  # its threads are not in a fork

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> int:
        import obstore

        content = b"".join(parts)
        with self._asking(f"{name} could not be stored"):
            obstore.put(self._bucket, name, content, chunk_size=_PART_BYTES, max_concurrency=_AT_A_TIME)
        return len(content)

    def write_if_absent(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        import obstore

        try:
            with self._asking(f"{name} could not be stored"):
                obstore.put(self._bucket, name, b"".join(parts), mode="create", use_multipart=False)
        except FileExistsError:
            return False
        return True

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview | None:
        import obstore

        if length == 0:
            return memoryview(b"") if self.exists(name) else None
        try:
            with self._asking(f"{name} could not be read"):
                if length is not None:
                    return _owned(obstore.get_range(self._bucket, name, start=start, length=length))
                options: Any = {"range": {"offset": start}} if start else None
                return _owned(obstore.get(self._bucket, name, options=options).bytes())
        except FileNotFoundError:
            return None
        except StoreError:
            size = self.size(name) if start or length is not None else None
            if size is None or start < size:
                raise
            return memoryview(b"")  # services refuse a range that begins at the end or behind it

    def map(self, name: str) -> memoryview | None:
        with tempfile.TemporaryFile(prefix="lmcache-rag-") as file:
            length = self._fetch(name, file)
            if not length:
                return None if length is None else memoryview(b"")
            file.flush()
            return memoryview(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ))

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        import obstore

        try:
            with self._asking(f"{name} could not be looked up"):
                return int(obstore.head(self._bucket, name)["size"])
        except FileNotFoundError:
            return None

    def delete(self, names: Iterable[str]) -> None:
        import obstore

        left = list(names)
        while left:
            try:
                with self._asking(f"{left[0]} and {len(left) - 1} others could not be deleted"):
                    obstore.delete(self._bucket, left)
                left = []
            except FileNotFoundError:  # a folder of files names the first that is not there, and stops
                with suppress(FileNotFoundError), self._asking(f"{left[0]} could not be deleted"):
                    obstore.delete(self._bucket, left.pop(0))

    def list(self, prefix: str) -> Iterator[str]:
        for name, _, _ in self._listed(prefix):
            yield name

    def folders(self, prefix: str) -> Sequence[str]:
        import obstore

        try:
            with self._asking(f"{prefix or 'its names'} could not be listed"):
                found = obstore.list_with_delimiter(self._bucket, prefix or None)
        except FileNotFoundError:
            return []
        paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        return sorted({path.rpartition("/")[2] for path in paths})

    def free_bytes(self) -> int | None:
        return None

    def entries(self) -> Iterator[tuple[str, int, float]]:
        return self._listed("")

    def touch(self, name: str) -> None:
        return

    def _listed(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        import obstore

        pages = iter(obstore.list(self._bucket, prefix or None))
        while True:
            try:
                with self._asking(f"{prefix or 'its names'} could not be listed"):
                    page = next(pages, None)
            except FileNotFoundError:
                return
            if page is None:
                return
            for item in page:
                yield item["path"], item["size"], item["last_modified"].timestamp()

    def _fetch(self, name: str, file: BinaryIO) -> int | None:
        """Write a blob into a file, a piece at a time; its length."""
        import obstore

        try:
            with self._asking(f"{name} could not be read"):
                return sum(file.write(piece) for piece in obstore.get(self._bucket, name).stream(_PART_BYTES))
        except FileNotFoundError:
            return None

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Raises `StoreError` that says what could not be done and why; what is absent, or there already, as Python's
        own errors."""
        from obstore.exceptions import AlreadyExistsError, BaseError

        self._process.check()
        try:
            yield
        except FileNotFoundError:
            raise
        except AlreadyExistsError as error:
            raise FileExistsError(what) from error
        except (BaseError, OSError, ValueError) as error:
            told = _TOLD.get(type(error).__name__)
            if told is None and re.search(r"status code: 501|NotImplemented", str(error)):
                told = _TOLD["NotSupportedError"]
            raise StoreError(f"{what} in {self._shown}: {told or _reason(error)}.") from None


def _reason(error: Exception) -> str:
    """The first line of an error, without what a URL says of credentials."""
    line = str(error).partition("\n")[0].strip().rstrip(".:")
    line = re.sub(r"(\w+://)[^/\s@]*@", r"\1", re.sub(r"\?\S*", "", line))
    return f"{line[:300]}. Check that the service is there, its address, and the credentials in the environment"


def _owned(content: Any) -> memoryview:
    """The bytes in memory that may be written to, as PyTorch asks of a buffer."""
    return memoryview(bytearray(content))
