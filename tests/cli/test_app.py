"""The command line, on a tiny model and real files: what it prints, and how it fails."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from lmcache_rag.bench.commands import write_rows
from lmcache_rag.bench.servers import S3Server
from lmcache_rag.cli.app import app, main
from lmcache_rag.cli.ask import NOTHING
from lmcache_rag.cli.serve import server_command, settings_of
from lmcache_rag.corpus import Manifest, formats
from lmcache_rag.engine import Completion, Delta, LocalEngine
from lmcache_rag.errors import LmcacheRagError
from lmcache_rag.prompt import MarkedPrompt
from lmcache_rag.request import ReuseReport
from tests.corpus.test_corpus import BINARY, text
from tests.models import make_tiny

pytestmark = pytest.mark.usefixtures("no_engine")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.txt").write_text(text(number))
    return folder


def run(*arguments: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed)


def error_of(result: Result) -> str:
    """The sentence that `main` would print; exit code 1 goes with it."""
    assert isinstance(result.exception, LmcacheRagError), result.output
    return str(result.exception)


def test_settings_from_the_environment(
    tmp_path: Path, model: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_RAG_MODEL", str(model))
    monkeypatch.setenv("LMCACHE_RAG_DTYPE", "bfloat16")
    monkeypatch.setenv("LMCACHE_RAG_MAX_MODEL_LEN", "256")
    monkeypatch.setenv("LMCACHE_RAG_STORE", str(tmp_path / "shared"))
    monkeypatch.setenv("LMCACHE_RAG_NAMESPACE", "acme")
    folder = tmp_path / "index"
    assert run("index", documents, "--index", folder, "--chunk-tokens", 40).exit_code == 0
    assert (tmp_path / "shared" / "acme").is_dir() and not (folder / "kv").exists()
    for name in ("DTYPE", "STORE", "NAMESPACE"):
        monkeypatch.delenv(f"LMCACHE_RAG_{name}")
    question = " ".join(["w20"] * 250)
    assert "the model takes 255 at most" in error_of(run("ask", question, "--index", folder))
    assert run("ask", "w20", "--index", folder, "--max-tokens", 2).exit_code == 0  # the index knows its compute type


def test_the_default_codec_is_learned_at_the_first_index_and_used(
    tmp_path: Path, model: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LMCACHE_RAG_CODEC")
    monkeypatch.setenv("LMCACHE_RAG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "index"
    options = ["--index", folder, "--chunk-tokens", 40, "--dtype", "float32"]
    first = run("index", documents, "--model", model, *options)
    assert first.exit_code == 0, first.output
    assert len(list((folder / "kv" / ".tables").rglob("000001.*"))) == 1
    assert len(list((tmp_path / "cache" / "codec").rglob("000001.*"))) == 1
    again = run("index", documents, *options)
    assert "2 unchanged; 0 passages computed" in " ".join(again.output.split())
    reuse = json.loads(run("ask", "w20 w30", "--index", folder, "--json", "--max-tokens", 2).stdout)["reuse"]
    assert reuse["mode"] == "blend" and reuse["codecs"]["balanced"] > 0 and reuse["missed_tokens"] == 0
    assert "made with another codec" in error_of(run("index", documents, "--codec", "small", *options))
    assert "there is no codec 'zip'" in error_of(run("index", documents, "--codec", "zip", *options))


def test_an_answer_has_the_clients_own_salt_and_plain_prefill_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all who ask a server by the command line would share one, and plain prefill be a hit of the last time's."""
    salts: list[str | None] = []
    done = Completion("Blue.", (), "stop", ReuseReport(), 0.1, 0.2, 10, 1)

    class Engine:
        def stream(self, *_: object, cache_salt: str | None = None) -> Iterator[Delta]:
            salts.append(cache_salt)
            yield Delta("", done)

        def generate(self, *_: object, cache_salt: str | None = None) -> Completion:
            salts.append(cache_salt)
            return done

    @contextlib.contextmanager
    def asked(*_: object, **__: object) -> Iterator[tuple[Engine, SimpleNamespace]]:
        prompt = SimpleNamespace(token_ids=[1])
        form = SimpleNamespace(prompt=SimpleNamespace(stop=()))
        yield Engine(), SimpleNamespace(search=lambda *_: [], prompt=lambda *_: prompt, manifest=form)

    monkeypatch.setattr("lmcache_rag.cli.ask.asked", asked)
    for _ in range(2):
        assert run("ask", "why?", "--server", "http://a", "--compare").exit_code == 0
    assert salts[0] is None and salts[2] is None and salts[1] and salts[3] and salts[1] != salts[3]


def test_index_then_ask(tmp_path: Path, model: Path, documents: Path) -> None:
    folder = tmp_path / "index"
    options = ["--index", folder, "--model", model, "--chunk-tokens", 40, "--dtype", "float32"]
    first = run("index", documents, *options)
    assert first.exit_code == 0, first.output
    assert "2 added" in first.output and "4 passages computed" in first.output
    again = run("index", documents, *options)
    assert "2 unchanged; 0 passages computed" in " ".join(again.output.split())
    asked = run("ask", "w20 w30", "--index", folder, "--dtype", "float32", "--json", "--compare", "--max-tokens", 5)
    assert asked.exit_code == 0, asked.output
    result = json.loads(asked.stdout)
    assert set(result) == {"answer", "answered", "sources", "reuse", "ttft_s", "plain"}
    assert result["answered"] and result["answer"]
    assert {"path", "text"} <= set(result["sources"][0])
    assert result["reuse"]["mode"] == "blend" and result["reuse"]["missed_tokens"] == 0
    assert result["ttft_s"] > 0 and result["plain"]["ttft_s"] > 0
    shown = run("ask", "w20 w30", "--index", folder, "--dtype", "float32", "--max-tokens", 5)
    assert "0.txt" in shown.output and "reused" in shown.output and "TTFT" in shown.output


def test_a_question_that_is_not_answered_says_so(tmp_path: Path, model: Path, documents: Path) -> None:
    """The form's stop strings are those of what the tiny model writes at once."""
    folder = tmp_path / "index"
    options = ["--index", folder, "--dtype", "float32"]
    run("index", documents, *options, "--model", model, "--chunk-tokens", 40)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["prompt"]["stop"] = ["w", "<"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    asked = run("ask", "w20 w30", *options, "--max-tokens", 5)
    assert asked.exit_code == 0 and NOTHING in " ".join(asked.output.split()), asked.output
    asked = run("ask", "w20 w30", *options, "--max-tokens", 5, "--json")
    result = json.loads(asked.stdout)
    assert asked.exit_code == 0 and (result["answer"], result["answered"]) == ("", False)


def test_chat_remembers_what_was_said(tmp_path: Path, model: Path, documents: Path) -> None:
    folder = tmp_path / "index"
    options = ["--index", folder, "--dtype", "float32"]
    run("index", documents, *options, "--model", model, "--chunk-tokens", 40)
    lines = "w20 w30\n\nw40 [red]w50[/INST]\n" + " ".join(["w20"] * 1100) + "\nw60 \xe9\n"
    told = run("chat", *options, "--max-tokens", 5, "--json", "-k", 2, typed=lines)
    assert told.exit_code == 0, told.output
    first, second, third = map(json.loads, told.stdout.splitlines())
    assert [row["question"] for row in (first, second, third)] == ["w20 w30", "w40 [red]w50[/INST]", "w60 é"]
    assert "use fewer or shorter passages" in " ".join(told.stderr.split())
    lengths = [row["reuse"]["prompt_tokens"] for row in (first, second, third)]
    assert lengths[0] < lengths[1] < lengths[2]
    assert first["reuse"]["mode"] == "blend" and second["reuse"]["continued_tokens"] + second["reuse"]["local_tokens"]
    shown = run("chat", *options, "--max-tokens", 5, typed="w20 w30\n")
    assert shown.exit_code == 0 and "0.txt" in shown.output and "TTFT" in shown.output


def test_an_index_of_another_model_or_store(tmp_path: Path, model: Path, documents: Path) -> None:
    folder = tmp_path / "index"
    run("index", documents, "--index", folder, "--model", model, "--chunk-tokens", 40, "--dtype", "float32")
    assert "made with the model" in error_of(run("ask", "w20", "--index", folder, "--model", "other/model"))
    assert "keeps its KV in" in error_of(run("index", documents, "--index", folder, "--store", tmp_path / "kv"))
    assert "chunk length" in error_of(
        run("index", documents, "--index", folder, "--chunk-tokens", 50, "--dtype", "float32")
    )
    weights = model / "model.safetensors"
    original = weights.read_bytes()
    try:
        weights.write_bytes(original[:-4] + b"\0\0\0\0")
        assert "weights of the model" in error_of(run("ask", "w20", "--index", folder, "--dtype", "float32"))
    finally:
        weights.write_bytes(original)


def test_a_store_in_a_bucket_with_a_cache(tmp_path: Path, model: Path, documents: Path, s3_server: S3Server) -> None:
    folder, store = tmp_path / "index", s3_server.uri("cli")
    tier = ("--tier", f"file://{tmp_path}/cache?capacity=1GB")
    options = ("--index", folder, "--dtype", "float32", *tier)
    shown = run("index", documents, *options, "--model", model, "--chunk-tokens", 40, "--store", store)
    assert shown.exit_code == 0 and f"stored in {store}" in " ".join(shown.output.split())
    manifest = Manifest.read(folder)
    assert manifest is not None and manifest.store == store and not (folder / "kv").exists()
    assert str(tmp_path) not in (folder / "manifest.json").read_text().replace(str(model), "")
    answered = run("ask", "w20 w30", *options, "--max-tokens", 5, "--json")
    reuse = json.loads(answered.stdout)["reuse"]
    assert reuse["mode"] == "blend" and reuse["missed_tokens"] == 0 and list((tmp_path / "cache").rglob("*.v3"))
    command, _ = server_command(settings_of(folder, tiers=[tier[1]]))
    connector = json.loads(command[command.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert (connector["store"], connector["tiers"]) == (store, [tier[1]])
    assert "objects recorded" in run("store", "rebuild", store).output
    assert "keeps its KV in" in error_of(run("index", documents, "--index", folder, "--store", s3_server.uri("other")))
    assert "store: ftp:// is no store" in error_of(run("index", documents, "--store", "ftp://x"))
    assert "ftp:// is no store" in error_of(run("store", "rebuild", "ftp://x"))
    assert "tiers.0: " in error_of(run("ask", "w20", "--index", folder, "--tier", "redis://"))


def test_names_and_texts_are_shown_as_they_are(tmp_path: Path, model: Path) -> None:
    documents = tmp_path / "documents"
    (documents / "[red]a[").mkdir(parents=True)
    (documents / "[red]a[/INST].txt").write_text(f"[/INST] [link](url) :smile: {text(0)}")
    Path(os.fsdecode(os.fsencode(documents) + b"/[b]\xff.md")).write_text("w20")
    folder = tmp_path / "[bold]index[/none]"
    result = run("index", documents, "--index", folder, "--model", model, "--chunk-tokens", 40, "--dtype", "float32")
    shown = " ".join(result.output.split())
    assert result.exit_code == 1 and "1 added" in shown, result.output
    assert "/[b]\\udcff.md has a name that is not UTF-8" in shown
    assert "[bold]index[/none]" in shown.replace(" ", "")
    asked = run("ask", "[/INST] [red]w20[/nothing]", "--index", folder, "--dtype", "float32", "--max-tokens", 5)
    assert asked.exit_code == 0, asked.output
    shown = asked.output.replace("\n", "")
    assert "[red]a[/INST].txt: [/INST] [link](url) :smile: w" in shown and "TTFT" in shown


@pytest.mark.parametrize("name", ["[/INST] [red]x", "half \udcff"], ids=ascii)
def test_an_error_is_shown_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["lmcache-rag", "index", f"nowhere/{name}"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert f"nowhere/{ascii(name)[1:-1]} is not there: name a file or a folder." in capsys.readouterr().err


@pytest.mark.parametrize(("package", "extra"), [("faiss", "`local`"), ("torch", "`cpu` or `cuda`")])
def test_a_package_that_is_missing_is_named_with_its_extra(
    package: str, extra: str, documents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(name=package)

    monkeypatch.setattr("lmcache_rag.cli.index.started", missing)
    monkeypatch.setattr(sys, "argv", ["lmcache-rag", "index", str(documents)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert f"The package {package} is missing: install the extra {extra}" in " ".join(capsys.readouterr().err.split())


def test_files_that_cannot_be_used_are_named_once(tmp_path: Path, model: Path, documents: Path) -> None:
    (documents / "bad.md").write_bytes(BINARY)
    (documents / "empty [red].txt").write_text("")
    (documents / "umlaut.txt").write_text("w20 für w30", encoding="utf-16")
    options = ["--index", tmp_path / "index", "--model", model, "--chunk-tokens", 40, "--dtype", "float32"]
    first = run("index", documents, *options)
    shown = " ".join(first.output.split())
    assert first.exit_code == 0, first.output
    assert "3 added" in shown and "bad.md is a binary file" in shown and "empty [red].txt has no text in it" in shown
    again = run("index", documents, *options)
    assert again.exit_code == 0 and "3 unchanged" in " ".join(again.output.split())
    assert "bad.md" not in again.output and "2 files are left out as they were before" in again.output


def test_what_is_to_be_mended_is_an_error_every_time(
    tmp_path: Path, model: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    (documents / "manual [v1].pdf").write_bytes(b"%PDF")
    options = ["--index", tmp_path / "index", "--model", model, "--chunk-tokens", 40, "--dtype", "float32"]
    for _ in range(2):
        result = run("index", documents, *options)
        assert result.exit_code == 1
        assert "manual [v1].pdf: to read such files pypdf is needed" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["index", "nowhere"], "nowhere is not there"),
        (["index", ".", "--chunk-tokens", "3"], "chunk_tokens"),
        (["index", ".", "--namespace", "a/b"], "namespace"),
        (["index", ".", "--prompt", "poem"], "prompt"),
        (["ask", "why?", "--ratio", "1.5"], "ratio"),
        (["ask", "why?", "--selector", "best"], "selector"),
        (["ask", "why?"], "There is no index in .lmcache-rag"),
        (["ask", " "], "The question is empty"),
        (["ask", "why?", "--server", "http://a", "--model", "other"], "--model: a server has its own"),
        (["ask", "why?", "--server", "http://a", "--trace", "page.html"], "--trace: a server"),
        (["chat", "--server", "http://a", "--tier", "cache"], "--tier: a server"),
        (["bench", "ttft", "--ratios", "0.1,2"], "ratio"),
        (["bench", "ttft", "--selectors", "best"], "selector"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(
    arguments: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert problem in error_of(run(*arguments))
    assert not (tmp_path / ".lmcache-rag").exists()


@pytest.mark.parametrize("option", ["--index", "--store"])
def test_a_folder_whose_name_is_not_utf8(option: str, documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(documents.parent)
    assert "has a name that is not UTF-8" in error_of(run("index", documents, option, "folder \udcff"))


def test_an_empty_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "No documents" in error_of(run("index", tmp_path / "empty", "--index", tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_a_question_longer_than_the_context(tmp_path: Path, model: Path, documents: Path) -> None:
    folder = tmp_path / "index"
    run("index", documents, "--index", folder, "--model", model, "--chunk-tokens", 40, "--dtype", "float32")
    question = " ".join(["w20"] * 1100)
    assert "use fewer or shorter passages" in error_of(run("ask", question, "--index", folder, "--dtype", "float32"))


def test_folders_that_cannot_be_made(tmp_path: Path, documents: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in error_of(run("index", documents, "--index", tmp_path / "file" / "index"))
    result = run("index", documents, "--index", tmp_path / "index", "--store", tmp_path / "file" / "kv")
    assert "cannot be written to" in error_of(result)


def test_bench_ttft(tmp_path: Path, model: Path) -> None:
    rows_file = tmp_path / "rows.json"
    result = run(
        "bench", "ttft", "--model", model, "--dtype", "float32", "--chunks", 2, "--chunk-tokens", 100, "--ratios",
        "0.05,0.15", "--repeat", 1, "--json", rows_file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(rows_file.read_text())
    assert [row["mode"] for row in rows] == ["full", "prefix_cache", "reuse", *4 * ["blend"], "ingest"]
    blends = [(row["ratio"], row["chunks"]) for row in rows[3:-1]]
    assert blends == [(ratio, between) for ratio in (0.05, 0.15) for between in ("touching", "joined")]
    fields = {"mode", "selector", "ratio", "chunks", "prompt_tokens", "ttft_median_s", "ttft_min_s", "speedup_vs_full"}
    assert all(set(row) == fields | {"times_bound", "done_as", "phases_ms", "threads"} for row in rows[:-1])
    assert all({"load", "recompute", "write", "vllm"} <= set(row["phases_ms"]) for row in rows[2:-1])
    assert {"mode", "tokens", "seconds", "vs_plain_prefill", "primed_vs_plain_prefill"} <= set(rows[-1])


def test_a_benchmark_on_a_slow_store_says_what_was_done(tmp_path: Path, model: Path) -> None:
    rows_file = tmp_path / "rows.json"
    result = run(
        "bench", "ttft", "--model", model, "--dtype", "float32", "--chunks", 3, "--chunk-tokens", 200, "--ratios",
        "0.1", "--repeat", 1, "--store-mb-s", 0.1, "--json", rows_file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(rows_file.read_text())
    assert [row["done_as"] for row in rows[2:-1]] == ["plain", "plain", "plain"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["bench", "throughput", "--concurrency", "1,no"], "numbers from 1 on"),
        (["bench", "throughput", "--passages", 9, "--pool", 8], "pool"),
        (["bench", "fidelity", "--data", "/nonexistent.json"], "cannot be read"),
        (["calibrate", "--data", "/nonexistent.json"], "cannot be read"),
        (["index", ".", "--primer", "/nonexistent"], "cannot be read"),
        (["ask", "why?", "--target-kl", "0"], "target_kl"),
    ],
)
def test_bad_measurements_are_one_sentence(arguments: list[object], problem: str) -> None:
    assert problem in error_of(run(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["ttft", "--store-mb-s", 0],
        ["streaming", "--ratio", 2],
        ["streaming", "--goal-s", 0],
        ["streaming", "--slow-mb-s", -1],
        ["throughput", "--requests", "many"],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_numbers_out_of_range_are_refused_before_anything_starts(arguments: list[object]) -> None:
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert str(arguments[1]) in result.output


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lmcache_rag", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_while_vllm_starts(tmp_path: Path, model: Path, documents: Path) -> None:
    folder = tmp_path / "index"
    process = start("index", documents, "--index", folder, "--model", model, "--chunk-tokens", 40)
    wait_for(folder / "lock", process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Interrupted" in errors and "Traceback" not in errors, errors
    assert output == "" and not (folder / "manifest.json").exists()


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    tmp_path: Path, model: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "index"
    options = ["--index", folder, "--dtype", "float32"]
    run("index", documents, *options, "--model", model, "--chunk-tokens", 40)
    stream = LocalEngine.stream
    questions = 0

    def interrupted(self: LocalEngine, prompt: object, *arguments: object, **named: object) -> Iterator[Delta]:
        nonlocal questions
        questions += isinstance(prompt, MarkedPrompt)
        for delta in stream(self, prompt, *arguments, **named):  # type: ignore[arg-type]
            yield delta
            if questions == 1 and isinstance(prompt, MarkedPrompt):
                raise KeyboardInterrupt

    monkeypatch.setattr(LocalEngine, "stream", interrupted)
    told = run("chat", *options, "--max-tokens", 50, "--json", typed="w20\nw30\n")
    assert told.exit_code == 0, told.output
    assert [json.loads(line)["question"] for line in told.stdout.splitlines() if line.strip()] == ["w30"]


def test_standard_error_is_quiet(tmp_path: Path, model: Path, documents: Path) -> None:
    process = start("index", documents, "--index", tmp_path / "index", "--model", model, "--chunk-tokens", 40)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    shown = " ".join(errors.split())
    assert re.fullmatch(
        r"2 new or changed, [^:]*: 120 tokens to read, about \S+ GB of KV.* tokens \S+ 120/120 \S+", shown
    ), errors


def test_ctrl_c_and_a_second_process(tmp_path: Path, model: Path, documents: Path) -> None:
    for number in range(2, 400):
        (documents / f"{number}.txt").write_text(text(number, 400))
    folder = tmp_path / "index"
    arguments = ["index", documents, "--index", folder, "--model", model, "--chunk-tokens", 40, "--dtype", "float32"]
    first = start(*arguments)
    wait_for(folder / "kv" / "default", first)
    second = start(*arguments)
    output = second.communicate(timeout=120)
    assert second.returncode == 1 and "Another process is indexing" in " ".join(output[1].split()), output
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=120)
    assert first.returncode == 130 and "Interrupted" in output[1], output
    asked = run("ask", "w20", "--index", folder, "--dtype", "float32", "--json", "--max-tokens", 2)
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["sources"]


def test_killed_while_indexing(tmp_path: Path, model: Path, documents: Path) -> None:
    for number in range(2, 20):
        (documents / f"{number}.txt").write_text(text(number, 400))
    folder = tmp_path / "index"
    arguments = ["index", documents, "--index", folder, "--model", model, "--chunk-tokens", 40, "--dtype", "float32"]
    process = start(*arguments)
    wait_for(folder / "kv" / "default", process)
    time.sleep(1)
    process.kill()
    process.wait()
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    asked = run("ask", "w20", "--index", folder, "--dtype", "float32", "--json", "--max-tokens", 2)
    assert json.loads(asked.stdout)["reuse"]["missed_tokens"] == 0


def test_figures_that_cannot_be_written_are_not_lost_in_silence(tmp_path: Path) -> None:
    with pytest.raises(LmcacheRagError, match="the figures are above"):
        write_rows([{"mode": "full"}], tmp_path / "absent" / "rows.json")
