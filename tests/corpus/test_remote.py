"""An index that a server answers from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.corpus import IndexSettings, open_corpus, open_remotely, updating
from lmcache_rag.engine import LocalEngine
from lmcache_rag.errors import CorpusError
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
    (other / "manifest.json").write_text(json.dumps({**manifest, "model": str(make_tiny("llama", tmp_path / "tiny"))}))
    with pytest.raises(CorpusError, match="lmcache-rag serve --index"), open_remotely(other, smollm_server.url):
        pass


def test_an_index_is_not_changed_through_a_server(index: Path, smollm_server: RagServer) -> None:
    with open_remotely(index, smollm_server.url) as (_, corpus), pytest.raises(CorpusError, match="does not change it"):
        corpus.plan_update([CORPUS])
