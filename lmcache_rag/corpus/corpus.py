"""An index of documents: passages found by vectors (FAISS), with their KV in a store. Updates do only what changed."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from lmcache_rag.chunk_kv import context_digest, key_of, variant_of
from lmcache_rag.corpus.computing import Computing, LocalComputing
from lmcache_rag.corpus.database import Database, Passage
from lmcache_rag.corpus.documents import Document, absolute, find_files, may_exist, read_file
from lmcache_rag.corpus.embedder import Embedder
from lmcache_rag.corpus.formats import UnusableDocumentError, install_note, lacking
from lmcache_rag.corpus.manifest import Manifest, PrimerSource
from lmcache_rag.corpus.splitter import split
from lmcache_rag.corpus.updates import Pending, UpdatePlan, UpdateReport
from lmcache_rag.engine.base import Engine
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.remote import RemoteEngine
from lmcache_rag.errors import CorpusError
from lmcache_rag.learn.primer import default_primer, own_primer, primer_ids
from lmcache_rag.library.chunks import ChunkStore
from lmcache_rag.library.scopes import check_writable
from lmcache_rag.prompt import MarkedPrompt, check_text

OWN_STORE = "kv"
"""Folder of the KV store within an index that has one of its own."""


@dataclass(frozen=True)
class Hit:
    """A passage found for a question; `score` is the cosine of the vectors."""

    path: str
    text: str
    score: float


class Corpus:
    """An index in a folder, used with one engine.

    Args:
        manifest: what the index is to be made with; compared with what it was made with where it exists.
        computing: who computes KV where the index changes; None for a local engine itself.

    Attributes:
        primer: its token ids; none before the first update is planned.

    Raises:
        CorpusError: the index was made with another model, preamble, or other settings, or cannot be used.
    """

    def __init__(
        self, folder: Path, engine: Engine, embedder: Embedder, manifest: Manifest, computing: Computing | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._engine = engine
        self._embedder = embedder
        self._changing = computing
        self._preamble = manifest.prompt.preamble_ids(engine.tokenizer)
        self._set_primer(manifest.primer or "", manifest.primer_tokens or 0)
        known = Manifest.read(folder)
        if known is not None:
            known.check(folder, manifest)
            self.manifest = manifest.model_copy(update={"owner": known.owner})
        else:
            _check_chunk_length(manifest, engine, len(self._preamble))
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self._database = Database(folder / "index.sqlite")
        self._vectors: Any = None
        self._vectors_of: object = None

    def close(self) -> None:
        self._database.close()

    @property
    def _computing(self) -> Computing:
        """Raises `CorpusError` where the index was opened to be asked only."""
        if self._changing is None:
            if isinstance(self._engine, RemoteEngine):
                raise CorpusError("The index was opened to be asked: `lmcache-rag index --server URL` changes it.")
            self._changing = LocalComputing(cast("LocalEngine", self._engine))
        return self._changing

    def plan_update(self, paths: Sequence[Path]) -> UpdatePlan:
        """Read and split what is new or changed in `paths`. Documents that were below them and are gone are removed.

        Raises:
            StoreError: the store cannot be written to.
            CorpusError: as `find_files`; a single file that cannot be read or used is listed in the report instead.
        """
        chunks = self._computing.chunks()
        check_writable(chunks.store)
        known, report = self._database.documents(), UpdateReport()
        files = find_files(paths, known)
        roots = [absolute(path) for path in paths]
        seen = set(map(str, files))
        gone = [path for path in known if path not in seen and any(Path(path).is_relative_to(root) for root in roots)]
        refused = {path: digest for path, digest in self._database.refused().items() if may_exist(path)}
        pending, unchanged = [], set()
        for path in self._readable(files, report):
            try:
                file = read_file(path)
                if refused.get(file.path) == file.digest:
                    report.refused_before += 1
                    continue
                same = known.get(file.path) == file.digest
                if same and self._is_stored(file.path, chunks):
                    unchanged.add(file.path)
                    continue
                refused.pop(file.path, None)
                pending.append(self._split(file.document()))
                report.restored += same
            except UnusableDocumentError as error:
                report.refused.append(str(error))
                refused[file.path] = file.digest
                gone += [file.path] if file.path in known else []
            except CorpusError as error:
                report.faults.append(str(error))
        former, others = self.primer, known.keys() - {item.path for item in pending} - set(gone)
        reprimed = self._settle_primer(pending, {path: known[path] for path in sorted(others)})
        fresh, again = _tokens(pending), _tokens(reprimed)
        report.reprimed, report.unchanged = len(reprimed), len(unchanged.difference(item.path for item in reprimed))
        return UpdatePlan(
            pending=[*pending, *reprimed],
            removed=gone,
            refused=refused,
            former_primer=former if self.primer != former else [],
            report=report,
            tokens=fresh + again,
            needed_bytes=self._bounded(
                (fresh * (2 if self.primer else 1) + again) * self._computing.kv_bytes_per_token
            ),
            free_bytes=chunks.store.free_bytes(),
        )

    def update(
        self,
        plan: UpdatePlan,
        progress: Callable[[int], Any] | None = None,
        learning: Callable[[str], Any] | None = None,
    ) -> UpdateReport:
        """Carry a plan out, document by document, so that an interruption loses at most the one under way.

        Args:
            progress: gets the tokens of each passage done.
            learning: is told how far learning the codec is, where that comes first, and "tokens" when it is done.

        Raises:
            CorpusError: the KV would not fit the disk, or could not be stored; documents done so far are indexed.
        """
        if plan.free_bytes is not None and plan.needed_bytes > plan.free_bytes:
            raise CorpusError(
                f"The KV of the new passages needs up to {plan.needed_bytes / 1e9:.1f} GB, and only "
                f"{plan.free_bytes / 1e9:.1f} GB are free: free some space, or name another folder with --store."
            )
        report, known = plan.report, self._database.documents()
        if plan.pending:
            self._embedder.embed(["a"])  # fails before anything is written or computed
            self._computing.learn_codec(plan.texts, learning)
            if learning is not None:
                learning("tokens")
        with writing(self.folder):
            self.manifest.write(self.folder)
        for item in plan.pending:
            self._forget_primed(item, plan.former_primer)
            done = self._computing.compute(self._preamble, item.token_ids, progress, self.primer)
            if done.errors:
                raise CorpusError(f"The KV of {item.path} cannot be stored. {next(iter(done.errors.values()))}")
            vectors = self._embedder.embed(item.texts)
            keys = [key_of(ids) for ids in item.token_ids]
            self._computing.chunks().own(self.manifest.owner, keys)
            passages = [
                Passage(text, key.hex(), vector) for text, key, vector in zip(item.texts, keys, vectors, strict=True)
            ]
            self._database.replace(item.path, item.digest, passages)
            report.chunks_computed += done.computed
            report.chunks_present += done.present
            report.tokens_computed += done.tokens
            report.bytes_stored += done.bytes_stored
            report.evicted += done.evicted_objects
            report.seconds += done.seconds
            if item.path in known:
                report.changed += 1
            else:
                report.added += 1
        for path in plan.removed:
            self._database.remove(path)
            report.removed += 1
        self._database.set_refused(plan.refused)
        self._delete_unused_kv()
        return report

    def search(self, question: str, count: int) -> list[Hit]:
        """The `count` passages nearest to the question, nearest first, each text once.

        Raises:
            CorpusError: the index is empty.
            PromptError: the question is no text.
        """
        import faiss

        check_text(question)
        version = self._database.version()
        if self._vectors_of != version:
            ids, vectors = self._database.vectors()
            if not len(ids):
                raise CorpusError(f"The index {self.folder} is empty: index some documents first.")
            self._vectors = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
            self._vectors.add_with_ids(np.ascontiguousarray(vectors), ids)
            self._vectors_of = version
        asked, hits, wanted = self._embedder.embed([question]), dict[str, Hit](), count
        while True:
            scores, found = self._vectors.search(asked, wanted)
            for score, passage_id in zip(scores[0].tolist(), found[0].tolist(), strict=True):
                passage = self._database.passage(passage_id) if passage_id >= 0 else None
                if passage is not None:
                    hit = Hit(*passage, score)
                    hits.setdefault(hit.text, hit)
            if len(hits) >= count or wanted >= self._vectors.ntotal:
                return list(hits.values())[:count]
            wanted *= 2  # copies stood in the way of others

    def prompt(self, question: str, hits: Sequence[Hit]) -> MarkedPrompt:
        """The prompt for a question over the passages found for it."""
        prompt = self.manifest.prompt.plan(self._engine.tokenizer, [hit.text for hit in hits], question)
        return replace(prompt, primer=self.primer_digest)

    @property
    def primer_digest(self) -> str | None:
        """What the index's passages are computed behind, as prompts name it."""
        return context_digest(self.primer) if self.primer else None

    def _bounded(self, size_bytes: int) -> int:
        """What so many new bytes take at most: what goes over the store's limit is evicted."""
        capacity_bytes = self._computing.capacity_bytes
        return size_bytes if capacity_bytes is None else min(size_bytes, capacity_bytes)

    def _set_primer(self, text: str, room: int) -> None:
        self.primer = primer_ids(self._engine.tokenizer, text, room)

    def _settle_primer(self, pending: Sequence[Pending], others: dict[str, str]) -> list[Pending]:
        """Take the primer of a new index: what the user gave, else passages of its own, else the default. One that was
        too small for its own takes them, once, when it has grown; returned are those of its other documents (path ->
        digest) that are to be computed behind them.
        """
        manifest, new = self.manifest, self.manifest.primer_tokens is None
        source: PrimerSource = "default" if manifest.has_outgrowable_primer else manifest.primer_from or "given"
        if new and manifest.primer is not None:
            self._take_primer(manifest.primer, "given")
        elif new or source == "default":
            items = [self._tokenised(path, digest, self._database.passages_of(path)) for path, digest in others.items()]
            in_order = sorted([*pending, *items], key=lambda item: item.path)
            own = own_primer([text for item in in_order for text in item.texts], manifest.prompt)
            if own is not None:
                self._take_primer(own, "own")
                return [item for item in items if not self._unfit(item)]
            if new:
                self._take_primer(default_primer(), "default")
        if self.manifest.primer_from is None:  # as an earlier release left it
            self.manifest = self.manifest.model_copy(update={"primer_from": source})
        return []

    def _take_primer(self, text: str, source: PrimerSource) -> None:
        """Cut to what fits between the preamble and the longest chunk."""
        self._set_primer(text, self._primer_room())
        update = {"primer": text, "primer_tokens": len(self.primer), "primer_from": source}
        self.manifest = self.manifest.model_copy(update=update)

    def _primer_room(self) -> int:
        """How many tokens fit between the preamble and the longest chunk."""
        frame = len(self._preamble) + _frame_tokens(self.manifest, self._engine)
        return self._engine.max_model_len - frame - self.manifest.chunk_tokens - 1

    def _is_stored(self, path: str, chunks: ChunkStore) -> bool:
        """Whether the store still holds all variants of a document's passages, and the preamble's KV."""
        variants = {variant_of(self._preamble)}
        if len(self.primer) <= self._primer_room():  # else some chunks may have no primed variant
            variants.add(variant_of(self._preamble, self.primer))
        if chunks.lacks_preamble(self._preamble):
            return False
        keys = map(bytes.fromhex, self._database.chunk_keys(path))
        return not any(chunks.missing_of(key, variant) for key in keys for variant in variants)

    def _readable(self, files: Sequence[Path], report: UpdateReport) -> list[Path]:
        """The files whose format can be read here; what is not installed for the others is a fault."""
        missing = lacking(files)
        for module in dict.fromkeys(missing.values()):
            report.faults.append(install_note([path for path in missing if missing[path] == module], module))
        return [path for path in files if path not in missing]

    def _split(self, document: Document) -> Pending:
        manifest = self.manifest
        texts = split(document, self._engine.tokenizer, manifest.chunk_tokens, manifest.overlap_tokens)
        item = self._tokenised(document.path, document.digest, texts)
        if self._unfit(item):
            raise CorpusError(
                f"{document.path} has a passage of {max(map(len, item.token_ids))} tokens, and with the preamble's "
                f"{len(self._preamble)} that does not fit the model's context of {self._engine.max_model_len}: "
                "split it, or give the engine a longer context."
            )
        return item

    def _tokenised(self, path: str, digest: str, texts: list[str]) -> Pending:
        prompt, tokenizer = self.manifest.prompt, self._engine.tokenizer
        return Pending(path, digest, texts, [prompt.chunk_ids(tokenizer, text) for text in texts])

    def _unfit(self, item: Pending) -> bool:
        """Whether a passage is too long for the model."""
        longest = max(map(len, item.token_ids), default=0)
        return len(self._preamble) + longest >= self._engine.max_model_len

    def _forget_primed(self, item: Pending, former_primer: Sequence[int]) -> None:
        """In a store of the index's own, delete what was computed behind a primer that it has outgrown, before others
        are stored as residuals against what is computed behind the new one."""
        if former_primer and self.manifest.store == OWN_STORE:
            variant = variant_of(self._preamble, former_primer)
            self._computing.chunks().delete(map(key_of, item.token_ids), variant)

    def _delete_unused_kv(self) -> None:
        """Let go of the KV of passages that are gone; what no other index has a passage of is deleted."""
        chunks, owner = self._computing.chunks(), self.manifest.owner
        chunks.own(owner, map(bytes.fromhex, self._database.chunk_keys()))  # a rebuilt store knows no owners
        chunks.release(owner, map(bytes.fromhex, self._database.unused_chunks()))
        own = set(map(bytes.fromhex, self._database.chunk_keys()))
        chunks.release(owner, [key for key in chunks.owned(owner) if key not in own])  # of an update that was killed
        self._database.forget_unused_chunks()


def _tokens(items: Iterable[Pending]) -> int:
    return sum(len(token_ids) for item in items for token_ids in item.token_ids)


@contextmanager
def updating(folder: Path) -> Iterator[None]:
    """Hold the index in `folder`, made if need be, for changes.

    Raises:
        CorpusError: another process holds it, or the folder cannot be written to.
    """
    folder = Path(folder).expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CorpusError(
                f"Another process is indexing into {folder}: wait for it, or name another folder with --index."
            ) from error
        yield


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a failure to write into the index folder into a `CorpusError`."""
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"The index folder {folder} cannot be written to ({error.strerror}): "
            "change its permissions, or name another folder with --index."
        ) from error


def _frame_tokens(manifest: Manifest, engine: Engine) -> int:
    """How many tokens a passage has at most besides its text's. Around nothing some of them would be one."""
    return len(manifest.prompt.chunk_ids(engine.tokenizer, "A"))


def _check_chunk_length(manifest: Manifest, engine: Engine, preamble_tokens: int) -> None:
    frame = preamble_tokens + _frame_tokens(manifest, engine) + 1
    if manifest.chunk_tokens + frame > engine.max_model_len:
        raise CorpusError(
            f"Chunks of {manifest.chunk_tokens} tokens do not fit the model's context of {engine.max_model_len} "
            f"(the preamble takes {preamble_tokens}): choose {max(1, engine.max_model_len - frame)} or fewer."
        )
    if manifest.overlap_tokens >= manifest.chunk_tokens:
        raise CorpusError(
            f"Chunks of {manifest.chunk_tokens} tokens cannot overlap by {manifest.overlap_tokens}: choose less."
        )
