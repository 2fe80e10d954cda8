"""An index over real files with a real engine: updates do only what changed, and interruptions lose nothing."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmcache_rag.chunk_kv import NO_CONTEXT
from lmcache_rag.corpus import Corpus, IndexSettings, Manifest, SentenceEmbedder, UpdateReport, formats, updating
from lmcache_rag.corpus.corpus import OWN_STORE, _frame_tokens
from lmcache_rag.corpus.opening import _embedding_model
from lmcache_rag.engine import LocalEngine, precompute_texts
from lmcache_rag.errors import CorpusError, PromptError
from lmcache_rag.learn.primer import default_primer
from lmcache_rag.prompt import PromptFormat, completion_format

FORM = PromptFormat(preamble="w4 w5 w6 w7 ", chunk=" {text} ", question=" w8 {question} w9")
EMBEDDER = SentenceEmbedder()
BINARY = bytes(range(256))


def text(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(10, 380)}" for _ in range(words))


def manifest(engine: LocalEngine, **changes: object) -> Manifest:
    values = {
        "model": "tiny",
        "model_fingerprint": engine.model_fingerprint,
        "dtype": engine.dtype,
        "tokenizer_fingerprint": engine.tokenizer_fingerprint,
        "namespace": "default",
        "store": OWN_STORE,
        "prompt": FORM,
        "primer": "",
        "primer_tokens": 0,
        "chunk_tokens": 40,
        "overlap_tokens": 0,
        "embedding_model": EMBEDDER.name,
    }
    return Manifest(**{**values, **changes})


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(text(number))
    return folder


@pytest.fixture
def corpus(tmp_path: Path, llama: LocalEngine) -> Corpus:
    return Corpus(tmp_path / "index", llama, EMBEDDER, manifest(llama))


def update(corpus: Corpus, folder: Path) -> UpdateReport:
    with updating(corpus.folder):
        return corpus.update(corpus.plan_update([folder]))


def stored(engine: LocalEngine) -> int:
    return len(list(engine.store.list(engine.chunk_store().scope.prefix)))


def test_only_what_changed_is_processed_and_what_is_gone_is_removed(
    corpus: Corpus, documents: Path, llama: LocalEngine
) -> None:
    first = update(corpus, documents)
    assert (first.added, first.chunks_computed) == (3, 6)
    assert stored(llama) == 7  # and the preamble
    again = update(corpus, documents)
    assert (again.added, again.unchanged, again.chunks_computed) == (0, 3, 0)
    (documents / "0.txt").write_text(text(0) + " " + text(9, 30))
    (documents / "1.txt").unlink()
    (documents / "3.txt").write_text(text(2))  # the same text as 2.txt
    third = update(corpus, documents)
    assert (third.added, third.changed, third.removed, third.unchanged) == (1, 1, 1, 1)
    assert third.chunks_present == 1 + 2  # the changed document's start, and the copied document
    assert third.chunks_computed == 2
    (documents / "3.txt").unlink()
    assert update(corpus, documents).removed == 1
    assert stored(llama) == 1 + 3 + 2  # what 2.txt shares with the removed copy is kept


def test_documents_elsewhere_are_left_alone(corpus: Corpus, documents: Path, tmp_path: Path) -> None:
    update(corpus, documents)
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.md").write_text(text(20))
    report = update(corpus, other)
    assert (report.added, report.removed) == (1, 0)


def test_an_embedder_that_cannot_be_had_leaves_no_index(corpus: Corpus, documents: Path, llama: LocalEngine) -> None:
    class Missing:
        name = "misspelt"

        def embed(self, texts: object) -> None:
            raise CorpusError("could not be loaded")

    corpus._embedder = Missing()  # type: ignore[assignment]
    with pytest.raises(CorpusError, match="could not be loaded"):
        update(corpus, documents)
    assert Manifest.read(corpus.folder) is None and not stored(llama)


def test_copies_do_not_stand_in_the_way_of_other_passages(corpus: Corpus, documents: Path) -> None:
    for name in ("a", "b", "c"):
        (documents / f"{name}.md").write_text("The rain gauge has a funnel of brass.")
    update(corpus, documents)
    hits = corpus.search("Of what is the funnel of the rain gauge made?", 2)
    assert len({hit.text for hit in hits}) == len(hits) == 2 and "brass" in hits[0].text
    assert len(corpus.search("anything", 1000)) == 7


def test_a_passages_frame_is_measured_around_a_text(llama: LocalEngine) -> None:
    """Around nothing two ends of lines are one token, as in SmolLM2's vocabulary."""
    merging = SimpleNamespace(encode=lambda text, **_: list(text.replace("\n\n", "|")))
    assert _frame_tokens(manifest(llama, prompt=completion_format()), SimpleNamespace(tokenizer=merging)) == 3  # type: ignore[arg-type]


def test_search_and_prompt(corpus: Corpus, documents: Path, llama: LocalEngine) -> None:
    (documents / "rain.md").write_text("The rain gauge has a funnel of brass.")
    update(corpus, documents)
    hits = corpus.search("Of what is the funnel of the rain gauge made?", 2)
    assert hits[0].path.endswith("rain.md") and hits[0].score > hits[1].score
    plan = corpus.prompt("w20", hits)
    assert len(plan.segments) == 2
    assert llama.generate(plan).reuse.missed_tokens == 0
    assert len(corpus.search("anything", 1000)) == 7


def test_a_file_that_cannot_be_used_is_named_and_the_others_are_indexed(corpus: Corpus, documents: Path) -> None:
    (documents / "bad.txt").write_bytes(BINARY)
    report = update(corpus, documents)
    assert report.added == 3
    assert len(report.refused) == 1 and "bad.txt is a binary file" in report.refused[0]


def test_a_file_that_cannot_be_used_is_named_once_until_it_changes(corpus: Corpus, documents: Path) -> None:
    bad = documents / "bad.txt"
    bad.write_bytes(BINARY)
    assert len(update(corpus, documents).refused) == 1
    again = update(corpus, documents)
    assert (again.refused, again.refused_before, again.unchanged) == ([], 1, 3)
    bad.write_text(" ")
    assert "has no text in it" in update(corpus, documents).refused[0]
    bad.write_text(text(9))
    assert update(corpus, documents).added == 1
    bad.write_text(" ")
    report = update(corpus, documents)
    assert (len(report.refused), report.refused_before, report.removed) == (1, 0, 1)  # what it said is not kept
    bad.unlink()
    update(corpus, documents)
    bad.write_text(" ")
    assert len(update(corpus, documents).refused) == 1
    assert len(corpus.search("w20", 100)) == 6


def test_a_file_that_cannot_be_read_is_named_every_time(
    corpus: Corpus, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(corpus, documents)
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    (documents / "a.pdf").write_bytes(b"%PDF")
    (documents / "b.pdf").write_bytes(b"%PDF")
    for _ in range(2):
        report = update(corpus, documents)
        assert (report.unchanged, report.refused, len(report.faults)) == (3, [], 1)
        assert (
            "a.pdf" in report.faults[0] and "b.pdf" in report.faults[0] and "lmcache-rag[documents]" in report.faults[0]
        )


def test_an_interruption_keeps_the_documents_done(corpus: Corpus, documents: Path, llama: LocalEngine) -> None:
    plan = corpus.plan_update([documents])
    done = 0

    def interrupt(_tokens: int) -> None:
        nonlocal done
        done += 1
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.update(plan, interrupt)
    assert len(corpus.search("anything", 100)) == 2  # the first document
    report = update(corpus, documents)
    assert (report.added, report.unchanged) == (2, 1)
    assert report.chunks_present == 2  # what the interrupted document had stored already


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "other"}, "another model"),
        ({"model_fingerprint": "0" * 32}, "weights of the model"),
        ({"dtype": "bfloat16"}, "compute type"),
        ({"tokenizer_fingerprint": "0" * 32}, "tokenizer"),
        ({"prompt": completion_format()}, "preamble"),
        ({"chunk_tokens": 41}, "chunk length"),
        ({"namespace": "other"}, "namespace"),
        ({"embedding_model": "other"}, "embedding model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_index_made_with_something_else(
    corpus: Corpus, documents: Path, llama: LocalEngine, changes: dict[str, object], problem: str
) -> None:
    update(corpus, documents)
    with pytest.raises(CorpusError, match=problem):
        Corpus(corpus.folder, llama, EMBEDDER, manifest(llama, **changes))


def test_chunks_longer_than_the_context(tmp_path: Path, llama: LocalEngine) -> None:
    with pytest.raises(CorpusError, match="do not fit the model's context of 1024"):
        Corpus(tmp_path / "index", llama, EMBEDDER, manifest(llama, chunk_tokens=1020))
    with pytest.raises(CorpusError, match="cannot overlap"):
        Corpus(tmp_path / "index", llama, EMBEDDER, manifest(llama, overlap_tokens=40))
    assert Manifest.read(tmp_path / "index") is None


def test_a_second_process_is_kept_out(corpus: Corpus) -> None:
    with (
        updating(corpus.folder),
        pytest.raises(CorpusError, match="Another process is indexing"),
        updating(corpus.folder),
    ):
        pass


def test_an_empty_index_says_so(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="is empty"):
        corpus.search("anything", 3)


def test_too_little_space_is_said_before_anything_is_computed(
    corpus: Corpus, documents: Path, llama: LocalEngine
) -> None:
    from dataclasses import replace

    plan = replace(corpus.plan_update([documents]), free_bytes=1000)
    with pytest.raises(CorpusError, match="free some space"):
        corpus.update(plan)
    assert stored(llama) == 0


def test_lost_and_corrupt_kv_is_computed_again(corpus: Corpus, documents: Path, llama: LocalEngine) -> None:
    update(corpus, documents)
    names = sorted(llama.store.list(llama.chunk_store().scope.prefix))
    llama.store.delete(names[:1])
    damaged = llama.store.root.joinpath(*names[-1].split("/"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for seed in range(3):  # whoever asks finds the damage
        llama.generate(corpus.prompt("w20", corpus.search(text(seed), 6)), cache_salt=str(seed))
    assert not damaged.exists()
    report = update(corpus, documents)
    assert report.restored >= 1 and report.added == 0
    assert stored(llama) == len(names)
    assert update(corpus, documents).unchanged == 3


def test_a_lost_preamble_is_computed_again(corpus: Corpus, documents: Path, llama: LocalEngine) -> None:
    update(corpus, documents)
    preamble = FORM.preamble_ids(llama.tokenizer)
    name = llama.chunk_store().name(preamble, NO_CONTEXT)
    llama.store.delete([name])
    assert update(corpus, documents).restored == 3
    assert llama.store.exists(name)


def test_primed_variants_are_stored_restored_and_removed(tmp_path: Path, documents: Path, llama: LocalEngine) -> None:
    primed = manifest(llama, primer=text(40), primer_tokens=20)
    corpus = Corpus(tmp_path / "index", llama, EMBEDDER, primed)
    assert update(corpus, documents).chunks_computed == 6
    assert stored(llama) == 2 * 6 + 1
    done = llama.generate(corpus.prompt("w20", corpus.search(text(0), 3)))
    assert done.reuse.mode == "blend" and done.reuse.foreign_tokens == done.reuse.missed_tokens == 0
    name = next(name for name in llama.store.list(llama.chunk_store().scope.prefix) if "-" in name.rpartition("/")[2])
    llama.store.delete([name])
    assert update(corpus, documents).restored == 1
    assert llama.store.exists(name)
    with pytest.raises(CorpusError, match="another primer"):
        Corpus(corpus.folder, llama, EMBEDDER, manifest(llama))
    for path in documents.iterdir():
        path.unlink()
    update(corpus, documents)
    assert stored(llama) == 1


def test_a_new_index_chooses_its_primer_once(tmp_path: Path, documents: Path, llama: LocalEngine) -> None:
    """Out of its own passages where there are enough of them; later documents do not change it."""
    small = Corpus(tmp_path / "small", llama, EMBEDDER, manifest(llama, primer=None, primer_tokens=None))
    update(small, documents)
    assert small.manifest.primer == default_primer()
    for number in range(50, 70):
        (documents / f"{number}.txt").write_text(text(number))
    large = Corpus(tmp_path / "large", llama, EMBEDDER, manifest(llama, primer=None, primer_tokens=None))
    update(large, documents)
    chosen = large.manifest
    assert (
        chosen.primer is not None and chosen.primer.split()[0] in text(50).split() + text(51).split() + text(52).split()
    )
    assert chosen.primer_tokens == len(large.primer) == len(chosen.primer.split()) > 60
    assert Manifest.read(large.folder) == chosen
    (documents / "late.txt").write_text(text(90))
    again = Corpus(tmp_path / "large", llama, EMBEDDER, chosen)
    update(again, documents)
    assert again.manifest == chosen


def primed_variants(engine: LocalEngine) -> dict[str, int]:
    """Variant -> number of chunks that have it."""
    names = [name.rpartition("/")[2].partition(".")[0] for name in engine.store.list(engine.chunk_store().scope.prefix)]
    return {variant: names.count(variant) for variant in names if "-" in variant}


def test_an_index_that_has_grown_chooses_its_primer_again_and_only_once(
    tmp_path: Path, documents: Path, llama: LocalEngine
) -> None:
    small = Corpus(tmp_path / "index", llama, EMBEDDER, manifest(llama, primer=None, primer_tokens=None))
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text(text(40))
    update(small, documents)
    update(small, elsewhere)
    assert (small.manifest.primer_from, small.manifest.primer) == ("default", default_primer())
    (former,) = primed_variants(llama)
    small.close()
    for number in range(50, 58):
        (documents / f"{number}.txt").write_text(text(number))
    known = Manifest.read(small.folder)
    assert known is not None
    grown = Corpus(small.folder, llama, EMBEDDER, known)
    plan = grown.plan_update([documents])
    assert (plan.report.reprimed, plan.report.unchanged, len(plan.pending)) == (4, 0, 12)
    fresh, again = (
        sum(len(ids) for item in items for ids in item.token_ids) for items in (plan.pending[:8], plan.pending[8:])
    )
    assert plan.tokens == fresh + again
    assert plan.needed_bytes == (2 * fresh + again) * llama.kv_bytes_per_token
    with updating(grown.folder):
        report = grown.update(plan)
    assert (report.added, report.changed, report.unchanged) == (8, 4, 0)
    assert grown.manifest.primer_from == "own" and Manifest.read(grown.folder) == grown.manifest
    assert len(grown.search("anything", 100)) == 24
    ((variant, count),) = primed_variants(llama).items()
    assert variant != former and count == 24  # also the document elsewhere; what was behind the other primer is gone
    for path in (documents, elsewhere):
        assert update(grown, path).chunks_computed == 0
    for number in range(60, 63):
        (documents / f"{number}.txt").write_text(text(number))
    later = update(grown, documents)
    assert (later.added, later.reprimed) == (3, 0)
    assert set(primed_variants(llama)) == {variant}


@pytest.mark.parametrize("source", ["default", None], ids=["", "of an earlier release"])
def test_the_primer_of_an_index_that_is_still_small_stays(
    tmp_path: Path, documents: Path, llama: LocalEngine, source: str | None
) -> None:
    """Also where an engine with another context would cut it elsewhere."""
    small = manifest(llama, primer=default_primer(), primer_tokens=50, primer_from=source)
    corpus = Corpus(tmp_path / "index", llama, EMBEDDER, small)
    assert update(corpus, documents).reprimed == 0
    assert corpus.manifest == small.model_copy(update={"primer_from": "default"})
    assert len(corpus.primer) == 50


def test_a_primer_that_the_user_gave_stays(tmp_path: Path, documents: Path, llama: LocalEngine) -> None:
    given = manifest(llama, primer=default_primer(), primer_tokens=None)
    corpus = Corpus(tmp_path / "index", llama, EMBEDDER, given)
    update(corpus, documents)
    assert corpus.manifest.primer_from == "given"
    for number in range(50, 60):
        (documents / f"{number}.txt").write_text(text(number))
    assert update(corpus, documents).reprimed == 0
    assert corpus.manifest.primer == default_primer()


def test_an_index_of_an_earlier_release_opens_and_is_computed_under_todays_fingerprints(
    tmp_path: Path, documents: Path, llama: LocalEngine
) -> None:
    corpus = Corpus(tmp_path / "index", llama, EMBEDDER, manifest(llama))
    update(corpus, documents)
    corpus.close()
    earlier = corpus.manifest.model_dump(mode="json", exclude={"primer_from"})
    earlier |= {"model_fingerprint": "0" * 32, "tokenizer_fingerprint": "1" * 32}
    (corpus.folder / "manifest.json").write_text(json.dumps(earlier))
    with sqlite3.connect(corpus.folder / "index.sqlite") as database:
        database.execute("ALTER TABLE passages RENAME COLUMN chunk_key TO kv_prefix")
        database.execute(
            "UPDATE passages SET kv_prefix = 'default/' || hex(zeroblob(16)) || '/00/' || kv_prefix || '/'"
        )
    database.close()
    llama.chunk_store().clear()
    again = Corpus(corpus.folder, llama, EMBEDDER, manifest(llama, primer_from="given"))
    report = update(again, documents)
    assert (report.restored, report.chunks_computed) == (3, 6)
    assert stored(llama) == 6 + 1
    assert Manifest.read(corpus.folder) == again.manifest
    with pytest.raises(CorpusError, match="weights of the model"):
        Corpus(corpus.folder, llama, EMBEDDER, manifest(llama, model_fingerprint="2" * 32))


def test_a_file_whose_name_is_not_utf8_is_named_and_the_others_are_indexed(corpus: Corpus, documents: Path) -> None:
    bad = os.fsdecode(os.fsencode(documents) + b"/bad-\xff.txt")
    Path(bad).write_text(text(9))
    report = update(corpus, documents)
    assert report.added == 3
    assert report.faults == [f"{documents}/bad-\\udcff.txt has a name that is not UTF-8: rename it, or move it away."]


def test_a_document_with_a_passage_that_does_not_fit_is_named_and_the_others_are_indexed(
    tmp_path: Path, documents: Path, llama: LocalEngine
) -> None:
    """As in an engine with a shorter context than the one that made the index."""
    made = manifest(llama, chunk_tokens=1100)
    (tmp_path / "index").mkdir()
    made.write(tmp_path / "index")
    corpus = Corpus(tmp_path / "index", llama, EMBEDDER, made)
    (documents / "long.txt").write_text(text(9, 1090))
    report = update(corpus, documents)
    assert (report.added, len(report.faults)) == (3, 1)
    assert "long.txt has a passage of 1090 tokens" in report.faults[0]


def test_a_question_that_is_no_text_is_refused_in_words(corpus: Corpus) -> None:
    with pytest.raises(PromptError, match="half a surrogate pair"):
        corpus.search("why \udcff", 3)


def test_a_primer_is_cut_to_what_fits_the_model(tmp_path: Path, documents: Path, llama: LocalEngine) -> None:
    long = manifest(llama, primer=text(40, 2000), primer_tokens=None, chunk_tokens=300)
    corpus = Corpus(tmp_path / "index", llama, EMBEDDER, long)
    update(corpus, documents)
    assert 600 < len(corpus.primer) < llama.max_model_len - 300
    assert stored(llama) == 2 * 3 + 1


def test_a_primer_that_no_longer_fits_is_left_out_and_not_missed(
    tmp_path: Path, documents: Path, llama: LocalEngine
) -> None:
    """As in an engine with a shorter context than the one that made the index."""
    corpus = Corpus(tmp_path / "index", llama, EMBEDDER, manifest(llama, primer=text(40, 2000), primer_tokens=1500))
    update(corpus, documents)
    assert stored(llama) == 6 + 1
    again = update(corpus, documents)
    assert (again.unchanged, again.restored) == (3, 0)


def test_a_folder_that_was_emptied_empties_the_index(corpus: Corpus, documents: Path) -> None:
    update(corpus, documents)
    for path in documents.iterdir():
        path.unlink()
    assert update(corpus, documents).removed == 3
    with pytest.raises(CorpusError, match="is empty"):
        corpus.search("anything", 1)


def test_links_are_documents_where_they_are(corpus: Corpus, documents: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text(text(30))
    (documents / "link.txt").symlink_to(elsewhere)
    assert update(corpus, documents).added == 4
    (documents / "link.txt").unlink()
    assert update(corpus, documents).removed == 1


def test_another_process_changes_are_seen(corpus: Corpus, documents: Path, llama: LocalEngine) -> None:
    update(corpus, documents)
    assert len(corpus.search("anything", 100)) == 6
    other = Corpus(corpus.folder, llama, EMBEDDER, corpus.manifest)
    (documents / "0.txt").unlink()
    update(other, documents)
    other.close()
    assert len(corpus.search("anything", 100)) == 4


def test_an_index_without_documents_may_be_made_anew(corpus: Corpus, llama: LocalEngine, documents: Path) -> None:
    again = Corpus(corpus.folder, llama, EMBEDDER, manifest(llama, chunk_tokens=30))
    assert update(again, documents).added == 3


def test_long_passages_are_embedded_to_their_end() -> None:
    filler = "The quarterly report lists figures of no interest to anybody. " * 60
    vectors = EMBEDDER.embed([filler, filler + "The rain gauge has a funnel of brass.", "rain gauge funnel of brass"])
    assert vectors[1] @ vectors[2] > vectors[0] @ vectors[2] + 0.02


def test_a_damaged_manifest_or_index_says_what_to_do(corpus: Corpus, llama: LocalEngine) -> None:
    corpus.close()
    (corpus.folder / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(CorpusError, match="index the documents again"):
        Corpus(corpus.folder, llama, EMBEDDER, manifest(llama))
    (corpus.folder / "manifest.json").write_text("{")
    with pytest.raises(CorpusError, match="is damaged"):
        Manifest.read(corpus.folder)


def test_kv_that_somebody_else_owns_survives(tmp_path: Path, documents: Path, llama: LocalEngine) -> None:
    """Two indexes and a framework on one store, with the same text."""
    one, two = (Corpus(tmp_path / name, llama, EMBEDDER, manifest(llama)) for name in ("one", "two"))
    assert update(one, documents).chunks_computed == 6
    assert update(two, documents).chunks_present == 6
    passages = two._database.passages_of(str(documents / "0.txt"))
    preamble = one.manifest.prompt.preamble_ids(llama.tokenizer)
    assert precompute_texts(llama, preamble, passages[:1]).present == 1
    for path in documents.iterdir():
        path.unlink()
    update(one, documents)
    assert stored(llama) == 7
    update(two, documents)
    assert stored(llama) == 1 + 1  # the preamble, and what the framework has
    assert precompute_texts(llama, preamble, passages[:1]).present == 1


def test_the_folder_that_is_held_is_the_one_that_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with updating(Path("~/index")):
        assert (tmp_path / "index" / "lock").exists() and not (tmp_path / "~").exists()


def test_an_embedding_model_in_a_folder_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "embedder").mkdir()
    monkeypatch.chdir(tmp_path)
    for named, kept in (("embedder", str(tmp_path / "embedder")), ("org/model", "org/model"), (None, None)):
        assert _embedding_model(IndexSettings(embedding_model=named)) == kept
