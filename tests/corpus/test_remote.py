"""An index that a server answers from."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.corpus import IndexSettings, open_corpus, open_remotely, updating
from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import CorpusError, PromptError
from tests.models import make_tiny
from tests.servers import RagServer

CORPUS = Path(__file__).parents[2] / "examples" / "corpus"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one document of the handbook, with the default model."""
    folder = tmp_path_factory.mktemp("index")
    settings = IndexSettings(chunk_tokens=200, primer="")
    with updating(folder), open_corpus(folder, settings, create=True, max_model_len=2048) as (_, corpus):
        corpus.update(corpus.plan_update([CORPUS / "03-unpacking.md"]))
    return folder


@pytest.mark.usefixtures("no_engine")
def test_ask_and_chat_through_a_server(index: Path, smollm_server: RagServer) -> None:
    run = CliRunner()
    asked = ["--index", str(index), "--server", smollm_server.url, "-k", "2", "--json"]
    done = run.invoke(app, ["ask", "What is in the box?", *asked])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["answered"]
    assert answer["reuse"]["prompt_tokens"] > 200
    assert LocalEngine._running is None, "an engine was started"
    done = run.invoke(app, ["chat", *asked], input="What is in the box?\nAnd where is the pairing code?\n")
    assert done.exit_code == 0, done.output
    first, second = map(json.loads, done.stdout.splitlines())
    assert second["reuse"]["prompt_tokens"] > first["reuse"]["prompt_tokens"]
    assert second["reuse"]["local_tokens"] > 0, "the conversation was not continued"


def test_a_server_of_another_model_is_refused(index: Path, smollm_server: RagServer, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="There is no index"), open_remotely(tmp_path, smollm_server.url):
        pass
    other = tmp_path / "other"
    other.mkdir()
    manifest = json.loads((index / "manifest.json").read_text())
    named = {**manifest, "model": str(make_tiny("llama", tmp_path / "tiny"))}
    (other / "manifest.json").write_text(json.dumps({**named, "model_fingerprint": "0" * 32}))
    with pytest.raises(CorpusError, match="lmcache-rag serve --index"), open_remotely(other, smollm_server.url):
        pass
    (other / "manifest.json").write_text(json.dumps(named))
    with open_remotely(other, smollm_server.url):
        pass  # the same model by another name


def test_an_index_is_not_changed_through_a_server(index: Path, smollm_server: RagServer) -> None:
    with open_remotely(index, smollm_server.url) as (_, corpus), pytest.raises(CorpusError, match="opened to be asked"):
        corpus.plan_update([CORPUS])


@pytest.fixture
def second_server(smollm_server: RagServer, tmp_path: Path) -> Iterator[RagServer]:
    """On the same store."""
    server = RagServer.beside(smollm_server, tmp_path / "log")
    server.wait()
    yield server
    server.kill()


@pytest.mark.usefixtures("no_engine")
def test_servers_compute_an_index(smollm_server: RagServer, second_server: RagServer, tmp_path: Path) -> None:
    """Two of them on one store: each chunk is computed once, by either, and what is there is not computed again."""
    urls = (smollm_server.url, second_server.url)
    index = ["--index", str(tmp_path / "index"), "--chunk-tokens", "150"]
    documents = tmp_path / "documents"
    documents.mkdir()
    for name in ("03-unpacking.md", "04-site-selection.md"):
        shutil.copy(CORPUS / name, documents)

    def indexed() -> str:
        through = [argument for url in urls for argument in ("--server", url)]
        done = CliRunner().invoke(app, ["index", str(documents), *index, *through], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    before = [stored_by(url) for url in urls]
    first = indexed()
    assert "2 added" in first
    tokens = int(re.search(r"(\d+) tokens to read", first)[1])  # type: ignore[index]
    shares = [stored_by(url) - was for url, was in zip(urls, before, strict=True)]
    assert 2 * tokens <= sum(shares) < 2 * tokens + 200, "a variant was computed twice, or not at all"
    assert min(shares) > 0, "one server did everything"
    assert "2 unchanged; 0 passages computed" in indexed()
    (documents / "04-site-selection.md").unlink()
    assert "1 removed, 1 unchanged" in indexed()
    assert LocalEngine._running is None, "an engine was started"
    asked = CliRunner().invoke(app, ["ask", "What is in the box?", "--server", urls[0], "--json", *index[:2]])
    answer = json.loads(asked.stdout)
    assert answer["reuse"]["missed_tokens"] == 0 and answer["sources"]


def test_servers_that_cannot_compute_an_index(index: Path, smollm_server: RagServer, tmp_path: Path) -> None:
    moved = [
        "index",
        str(CORPUS),
        "--index",
        str(index),
        "--server",
        smollm_server.url,
        "--store",
        str(tmp_path / "kv"),
    ]
    with pytest.raises(CorpusError, match="keeps its KV in"):
        CliRunner().invoke(app, moved, catch_exceptions=False)
    new = ["index", str(CORPUS), "--index", str(tmp_path / "index"), "--server", smollm_server.url]
    with pytest.raises(PromptError, match="are the server's"):
        CliRunner().invoke(app, [*new, "--codec", "raw"], catch_exceptions=False)
    elsewhere = [*new, "--store", str(tmp_path / "kv")]
    with pytest.raises(CorpusError, match="another store than this index"):
        CliRunner().invoke(app, elsewhere, catch_exceptions=False)


def stored_by(url: str) -> int:
    """Tokens that a server has stored, the preamble's among them."""
    with urllib.request.urlopen(f"{url}/lmcache-rag/status", timeout=60) as response:
        return int(json.load(response)["totals"].get("stored_tokens", 0))
