"""`bench scale` on a tiny model: its rows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcache_rag.bench.scale import read_chunks
from lmcache_rag.bench.servers import RedisServer
from lmcache_rag.bench.tiers import tier_rates
from lmcache_rag.blobs.disk import DiskStore
from lmcache_rag.cli.app import app
from lmcache_rag.errors import CorpusError, PromptError
from tests.models import make_tiny


class Characters:
    """A token a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]


def written(path: Path, *passages: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    return path


def test_passages_are_joined_into_chunks(tmp_path: Path) -> None:
    path = written(tmp_path / "text.jsonl", {"title": "ab", "text": "cdef"}, {"text": "ghijkl"})
    chunks = read_chunks(Characters(), path, 3, 5)  # type: ignore[arg-type]
    assert ["".join(map(chr, chunk)) for chunk in chunks] == ["ab\ncd", "ef\ngh", "ijkl\n"]
    with pytest.raises(CorpusError, match="text for 3 chunks"):
        read_chunks(Characters(), path, 4, 5)  # type: ignore[arg-type]
    (tmp_path / "none").write_text("no JSON")
    with pytest.raises(CorpusError, match="one a line"):
        read_chunks(Characters(), tmp_path / "none", 4, 5)  # type: ignore[arg-type]


def test_the_rows(tmp_path: Path, engines: object) -> None:
    engines.close()  # type: ignore[attr-defined]
    words = " ".join(f"w{number % 90 + 5}" for number in range(7, 2000, 3))
    data = written(tmp_path / "text.jsonl", {"text": words}, {"text": words[5:]})
    tiers = ["memory", "disk", "s3", *(["redis"] if RedisServer.is_there() else [])]
    result = CliRunner().invoke(
        app,
        [
            *("bench", "scale", "--data", str(data), "--limit", "8", "--chunk-tokens", "100", "--questions", "2"),
            *("--model", str(make_tiny("llama", tmp_path / "tiny")), "--codec", "raw", "--dtype", "float32"),
            *("--tiers", ",".join(tiers), "--json", str(tmp_path / "rows.json"), "--keep", str(tmp_path / "kept")),
        ],
    )
    assert result.exception is None, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["tier"] for row in rows] == tiers
    assert all(row["hit_rate"] == 1.0 and row["ttft_blend_s"] > 0 and row["bytes_per_token"] > 0 for row in rows)
    assert (tmp_path / "kept").is_dir()


def test_an_unknown_tier() -> None:
    result = CliRunner().invoke(app, ["bench", "scale", "--data", "none", "--tiers", "tape"])
    assert isinstance(result.exception, PromptError) and "'tape'" in str(result.exception)


def test_rates_of_a_disk(tmp_path: Path) -> None:
    rates = tier_rates(DiskStore(tmp_path))
    assert rates.keys() == {"put_mb_s", "get_mb_s", "first_byte_ms"} and min(rates.values()) > 0
    assert not list(DiskStore(tmp_path).list("bench/"))
