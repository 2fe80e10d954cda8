"""Servers on this machine, to measure stores that are reached over a network: an S3 API, and Redis."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Self

from lmcache_rag.errors import StoreError

BUCKET = "kv-bucket"

_S3 = """
import sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()
def one_at_a_time(environ, start_response):
    with lock:  # moto looks and then writes; of S3 a conditional write is one step
        return app(environ, start_response)
server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.port, flush=True)
sys.stdin.read()
"""


class S3Server:
    """An S3 API with one bucket, in a process of its own, which ends with this one.

    Raises:
        StoreError: moto's server is not installed, or does not start.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _S3], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline()
        if not port:
            raise StoreError("An S3 API on this machine takes a package more: pip install 'moto[server]'.")
        self.port = int(port)
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request("PUT", f"/{BUCKET}", headers={"Host": "s3.us-east-1.amazonaws.com"})
        if connection.getresponse().status != HTTPStatus.OK:
            raise StoreError("The S3 API on this machine makes no bucket.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def uri(self, prefix: str, port: int | None = None) -> str:
        return f"s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{port or self.port}"

    def close(self) -> None:
        """End it."""
        self._process.communicate()


class RedisServer:
    """A `redis-server` process that can be killed and started again, with what it has saved.

    Args:
        folder: for what it saves.
        options: of its command line.

    Raises:
        StoreError: it is not installed, or does not start.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        if not self.is_there():
            raise StoreError("There is no `redis-server` on this machine: install it (apt-get install redis-server).")
        self.port = free_port()
        self._command = [
            *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""),
            *options,
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @staticmethod
    def is_there() -> bool:
        return shutil.which("redis-server") is not None

    def uri(self, prefix: str) -> str:
        return f"redis://127.0.0.1:{self.port}/0?prefix={prefix}/"

    def start(self) -> None:
        """Returns when it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)  # noqa: S603
        while self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port)) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(5)[:1] in (b"+", b"-"):  # "-" asks for a password
                        return
            except OSError:
                time.sleep(0.01)
        raise StoreError("`redis-server` did not start.")

    def kill(self) -> None:
        """Without a chance to save."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
