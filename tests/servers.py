"""Real servers for tests: `lmcache-rag serve`, and an HTTP server that fails as it is told."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lmcache_rag.corpus import Manifest
from lmcache_rag.prompt import completion_format


class RagServer:
    """`lmcache-rag serve` over an empty index of a model, in another process.

    Args:
        model: folder or name.
        arguments: of `serve`; behind a `--` those of vLLM.

    Attributes:
        url: without `/v1`.
    """

    def __init__(self, folder: Path, model: str, arguments: Sequence[str]) -> None:
        index = folder / "index"
        index.mkdir(parents=True)
        Manifest(
            model=model, model_fingerprint="", dtype="float32", tokenizer_fingerprint="", namespace="default",
            store="kv", codec="raw", prompt=completion_format(), chunk_tokens=512, overlap_tokens=0,
            embedding_model="none",
        ).write(index)  # fmt: skip
        self._start(folder / "log", index, arguments)

    @classmethod
    def beside(cls, other: RagServer, log: Path) -> RagServer:
        """Another server of the same index, and so on the same store."""
        server = cls.__new__(cls)
        server._start(log, other._index, other._arguments)
        return server

    def _start(self, log: Path, index: Path, arguments: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log, self._index, self._arguments = log, index, arguments
        self.url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable, "-c", "from lmcache_rag.cli.app import main; main()", "serve", "--index", str(index),
            "--port", str(port), *arguments,
        ]  # fmt: skip
        with log.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 500
        while True:
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(1)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # vLLM's engine is a process of its own
        self._process.wait()

    def interrupt(self) -> int:
        """Ctrl-C; returns its exit code."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(timeout=60)


class FaultyProxy:
    """Passes requests on to an S3 API, but for what `fault` does instead. What it returns is answered: a status, None
    for what the API says, "hang" for nothing, "cut" for the first half of what the API says."""

    def __init__(self, target: int) -> None:
        self.fault: Callable[[str, str], int | str | None] = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self._ended = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                return

            def _answer(self) -> None:
                proxy.requests.append((self.command, self.path))
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.fault(self.command, self.path)
                if fault == "hang":
                    self.close_connection = True
                    proxy._ended.wait(60)
                    return
                if isinstance(fault, int):
                    text = b"<Error><Code>SlowDown</Code><Message>as told</Message></Error>"
                    self.send_response(fault)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(b"" if self.command == "HEAD" else text)
                    return
                connection = HTTPConnection("127.0.0.1", target)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if fault == "cut":
                    content, self.close_connection = content[: len(content) // 2], True
                self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                return  # a client that gave up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
