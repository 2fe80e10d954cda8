"""The formulas: against what was measured, and against what must hold whatever the machine is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcache_rag.cli.app import app
from lmcache_rag.errors import LmcacheRagError, ModelError
from lmcache_rag.sizing import MODELS, Corpus, Links, Load, estimate, gpus, measured_hardware, model_shape
from lmcache_rag.sizing.estimate import hot_share
from lmcache_rag.sizing.formulas import blend_parts, full_prefill_s

RESULTS = Path(__file__).parents[2] / "docs" / "report" / "results"
LLAMA = MODELS["llama-3.1-8b"]
CORPUS = Corpus(tokens=10_000_000)
FAST = Links(store_bytes=5e9)


def test_weights_are_those_of_the_models() -> None:
    """Without embeddings: 6.98 of 8.03 billion, 68.5 of 70.6."""
    assert LLAMA.weights == pytest.approx(6.98e9, rel=0.01)
    assert MODELS["llama-3.3-70b"].weights == pytest.approx(68.5e9, rel=0.01)
    assert (LLAMA.kv_bytes, MODELS["smollm2-135m"].kv_bytes) == (131_072, 23_040)


def test_models_are_read_from_their_configuration(tmp_path: Path) -> None:
    config = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32, "num_key_value_heads": 8,
              "intermediate_size": 14_336, "vocab_size": 128_256}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_shape(str(tmp_path)).weights == LLAMA.weights
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 32}))
    with pytest.raises(ModelError, match="has no 'hidden_size'"):
        model_shape(str(tmp_path))
    with pytest.raises(ModelError, match=r"none of .*llama-3\.1-8b"):
        model_shape("nobody/knows")


@pytest.mark.parametrize("name", ["ttft_650", "ttft_1550", "ttft", "ttft_6000"])
def test_what_was_measured_is_foretold_within_a_quarter(name: str) -> None:
    """From prompts of about 650 and 2,950 tokens, all that the report has."""
    model = MODELS["smollm2-135m"]
    anchors = [
        row for each in ("ttft_650", "ttft") for row in json.loads((RESULTS / f"{each}.json").read_text())["rows"]
    ]
    hardware = measured_hardware(anchors, model)
    if not (RESULTS / f"{name}.json").exists():
        pytest.skip("not in the report yet")
    for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]:
        tokens = row.get("prompt_tokens", 0)
        if row["mode"] == "full":
            assert full_prefill_s(model, hardware, tokens) == pytest.approx(row["ttft_median_s"], rel=0.25)
        elif row["mode"] == "reuse" or row.get("selector") == "query":
            parts = blend_parts(model, hardware, tokens, 32, row["ratio"], 0.0)
            assert sum(parts.values()) == pytest.approx(row["ttft_median_s"], rel=0.25), row


def test_a_faster_store_and_a_longer_prompt_pay_more() -> None:
    hardware = gpus("h100", 1, LLAMA)

    def found(links: Links = FAST, ratio: float = 0.15, **fields: int):
        return estimate(LLAMA, hardware, Corpus(10_000_000, **fields), links, Load(), ratio=ratio, codec="balanced")

    usual = found(passages=30)
    assert usual.speedup > found(ratio=0.4, passages=30).speedup > 0
    assert found(passages=60).speedup > usual.speedup > 1 > found().speedup  # a short prompt is prefilled sooner
    assert usual.speedup > found(Links(store_bytes=5e8), passages=30).speedup
    assert usual.blend_s == pytest.approx(sum(usual.parts_s.values()))
    even = found(Links(store_bytes=usual.break_even_bytes), passages=30)
    assert even.speedup == pytest.approx(1.0)
    assert usual.least_tokens is not None and CORPUS.prompt_tokens < usual.least_tokens < 30 * 512
    assert found(Links(store_bytes=1e6)).least_tokens is None


@pytest.mark.parametrize(
    ("tokens", "full_s", "blends"),
    [(2920, 0.075, {0.0: 0.052, 0.05: 0.104, 0.15: 0.099}), (7240, 0.198, {0.0: 0.104, 0.05: 0.178, 0.15: 0.176})],
)
def test_what_one_h100_gave(tokens: int, full_s: float, blends: dict[float, float]) -> None:
    """docs/sizing.md: from memory, so nothing is read."""
    hardware = gpus("h100", 1, LLAMA)
    assert full_prefill_s(LLAMA, hardware, tokens + 24) == pytest.approx(full_s, rel=0.25)
    for ratio, blend_s in blends.items():
        found = sum(blend_parts(LLAMA, hardware, tokens, 24, ratio, 0.0).values())
        assert found == pytest.approx(blend_s, rel=0.25), ratio


def test_a_load_that_plain_prefill_cannot_bear() -> None:
    hardware = gpus("h100", 1, LLAMA)
    corpus = Corpus(10_000_000, passages=30)
    alone = estimate(LLAMA, hardware, corpus, FAST, Load(), ratio=0.15, codec="balanced")
    between = math.sqrt(alone.full_most_per_s * alone.blend_most_per_s)
    loaded = estimate(LLAMA, hardware, corpus, FAST, Load(between), ratio=0.15, codec="balanced")
    assert loaded.full_load_s == math.inf and alone.blend_s < loaded.blend_load_s < math.inf


def test_reads_that_memory_answers() -> None:
    corpus = Corpus(tokens=512 * 10_000)
    assert hot_share(corpus, corpus.tokens, 1.0) == 1.0
    assert hot_share(corpus, 100, 1.0) == 0.0
    assert hot_share(corpus, corpus.tokens / 10, 0.0) == pytest.approx(0.1, rel=0.01)
    assert 0.5 < hot_share(corpus, corpus.tokens / 10, 1.0) < hot_share(corpus, corpus.tokens / 5, 1.0) < 1


def test_what_cannot_be_estimated() -> None:
    with pytest.raises(LmcacheRagError, match="cannot hold"):
        gpus("l4", 1, MODELS["llama-3.3-70b"])
    with pytest.raises(LmcacheRagError, match="no 'tpu'"):
        gpus("tpu", 1, LLAMA)
    with pytest.raises(LmcacheRagError, match="two lengths"):
        measured_hardware([], LLAMA)
    with pytest.raises(LmcacheRagError, match="two lengths"):
        measured_hardware([{"setting": "default", "questions": 200}, {"mode": "blend", "requests_per_s": 2.0}], LLAMA)


def test_raw_kv_is_as_wide_as_the_model_computes() -> None:
    found = estimate(LLAMA, gpus("h100", 1, LLAMA), CORPUS, FAST, Load(), ratio=0.1, codec="raw")
    assert found.stored_bytes == pytest.approx(2 * CORPUS.tokens * LLAMA.kv_bytes)


def test_the_command(tmp_path: Path) -> None:
    usual, wide = ["plan", "--model", "llama-3.1-8b", "--passages", "30"], {"COLUMNS": "160"}
    shown = CliRunner().invoke(app, [*usual, "--store-gb-s", "5"], env=wide)
    assert shown.exit_code == 0 and "It pays" in shown.output and "what one H100 gave" in shown.output
    slow = CliRunner().invoke(app, [*usual, "--store-gb-s", "0.1"], env=wide)
    assert "Plain prefill is faster here, below 1.49" in slow.output
    as_json = CliRunner().invoke(app, ["plan", "--model", "llama-3.1-8b", "--json"])
    assert json.loads(as_json.output)["blend_s"] > 0
    bad = tmp_path / "rows.json"
    bad.write_text("{}")
    for wrong, words in (["--codec", "zip"], "no 'zip'"), (["--measured", str(bad)], "has no rows"):
        with pytest.raises(LmcacheRagError, match=words):
            CliRunner().invoke(app, ["plan", "--model", "llama-3.1-8b", *wrong], catch_exceptions=False)
