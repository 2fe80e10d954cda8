"""Engines shared by all tests. A process can run one vLLM engine at a time, so tests are sorted by the engine they use
and each engine is started once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_rag.bench.servers import RedisServer, S3Server
from lmcache_rag.engine import EngineSettings, LocalEngine
from lmcache_rag.model import DEFAULT_MODEL
from tests.servers import FaultyProxy, RagServer

os.environ.setdefault("LMCACHE_RAG_CODEC", "raw")  # exact; tests of other codecs name them
os.environ.setdefault(
    "LMCACHE_RAG_NEVER_SLOWER", "false"
)  # with tiny models and short prompts plain prefill mostly is faster
os.environ.setdefault("LMCACHE_RAG_HOT_BYTES", "0")  # what is damaged in the store is to be read
os.environ.setdefault("LMCACHE_RAG_REFINE", "off")  # no test is to depend on how long another was idle
os.environ.setdefault("LMCACHE_RAG_LEARN", "off")

DATA = Path(__file__).parents[2] / "shared" / "data"
TINY_NAMES = ("llama", "llama3-rope", "qwen3", "gemma3")


class Engines:
    """Keeps one engine running."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._engine: LocalEngine | None = None

    def get(self, name: str) -> LocalEngine:
        """The engine of the model `name`, with an empty store; it uses a primer where it is given one."""
        if self._name != name:
            self.close()
            self._engine = LocalEngine(self._settings(name))
            self._name = name
        assert self._engine is not None
        self._engine.chunk_store().clear()
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._name, self._engine = "", None

    def _settings(self, name: str) -> EngineSettings:
        store = self._folder / "stores" / name
        if name == "smollm":
            return EngineSettings(
                store=store,
                dtype="float32",
                max_model_len=4096,
                kv_cache_bytes=1 << 30,
                primed=False,
            )
        from tests.models import make_tiny

        folder = self._folder / "models" / name
        if not folder.exists():
            make_tiny(name, folder)
        return EngineSettings(
            model=str(folder),
            store=store,
            dtype="float32",
            kv_cache_bytes=64 << 20,
            max_num_batched_tokens=256,
            primed=False,
            forced_answers=True,
        )


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    engines = Engines(tmp_path_factory.mktemp("engines"))
    yield engines
    engines.close()


@pytest.fixture
def smollm(engines: Engines) -> LocalEngine:
    """SmolLM2 in float32, with an empty store."""
    return engines.get("smollm")


@pytest.fixture(params=TINY_NAMES)
def tiny(request: pytest.FixtureRequest, engines: Engines) -> LocalEngine:
    """An engine of each tiny architecture in turn, with an empty store."""
    return engines.get(request.param)


@pytest.fixture
def llama(engines: Engines) -> LocalEngine:
    """The tiny Llama's engine, with an empty store."""
    return engines.get("llama")


@pytest.fixture
def no_engine(engines: Engines) -> None:
    """No engine runs in this process, so that the test may start its own."""
    engines.close()


@pytest.fixture(scope="session")
def smollm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RagServer]:
    """SmolLM2 on a server whose clients may store KV."""
    server = RagServer(
        tmp_path_factory.mktemp("smollm-server"),
        DEFAULT_MODEL,
        ["--clients-precompute", "--", "--kv-cache-memory-bytes", str(512 << 20), "--max-model-len", "4096"],
    )
    server.wait()
    yield server
    server.kill()


@pytest.fixture
def data_folder() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"needs the evaluation data in {DATA}")
    return DATA


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 API; the environment has its credentials."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "ACCESS_KEY_ID": "test",
            "SECRET_ACCESS_KEY": "hidden-secret",
            "REGION": "us-east-1",
        }.items():
            environment.setenv(f"AWS_{name}", value)
        server = S3Server()
        yield server
        server.close()


@pytest.fixture
def faulty_s3(s3_server: S3Server) -> Iterator[FaultyProxy]:
    """A way to the S3 API on which everything can go wrong."""
    proxy = FaultyProxy(s3_server.port)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis server for all tests that leave it alone."""
    if not RedisServer.is_there():
        pytest.skip("needs redis-server")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without an engine first, then engine by engine."""

    def engine_of(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        if "tiny" in names:
            return 1 + TINY_NAMES.index(item.callspec.params["tiny"])  # type: ignore[attr-defined]
        if "llama" in names:
            return 1 + TINY_NAMES.index("llama")
        if "smollm" in names:
            return 10
        if "smollm_server" in names:
            return 30
        return 20 if {"no_engine", "engine"} & set(names) else 0

    items.sort(key=engine_of)


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A file system of 1 MiB. Skips where none can be mounted."""
    import subprocess
    import tempfile

    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        shutil.rmtree(folder)
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)
    shutil.rmtree(folder, ignore_errors=True)
