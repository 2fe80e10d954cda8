"""Opening an index: the engine and the corpus that its manifest, or the user for a new one, asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmcache_rag.blobs.uri import StoreURI, is_folder, open_store, resolved
from lmcache_rag.corpus.computing import ServedComputing
from lmcache_rag.corpus.corpus import OWN_STORE, Corpus
from lmcache_rag.corpus.documents import printed
from lmcache_rag.corpus.embedder import DEFAULT_EMBEDDING_MODEL, SentenceEmbedder
from lmcache_rag.corpus.manifest import Manifest
from lmcache_rag.engine.base import Engine
from lmcache_rag.engine.local import LocalEngine
from lmcache_rag.engine.remote import RemoteEngine
from lmcache_rag.engine.settings import EngineSettings
from lmcache_rag.errors import CorpusError
from lmcache_rag.library.chunks import ChunkStores
from lmcache_rag.library.scopes import check_writable
from lmcache_rag.prompt import PromptFormat, chat_format, completion_format
from lmcache_rag.request import INGEST_KEY, NAMESPACE_PATTERN, first_problem


class IndexSettings(BaseModel):
    """What an index is made with. None stands for what an existing index was made with, else for the default.

    Attributes:
        store: folder or URI of the KV store; by default within the index. Name one to share it with other indexes.
        prompt: `completion` is plain text, `chat` the model's own chat template; or a form of your own.
        primer: text to compute chunks behind as well, in place of passages of the documents' own; an empty one leaves
            that out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model: str | None = None
    store: StoreURI | None = None
    namespace: str | None = Field(default=None, pattern=NAMESPACE_PATTERN)
    chunk_tokens: int | None = Field(default=None, ge=16)
    overlap_tokens: int | None = Field(default=None, ge=0)
    embedding_model: str | None = None
    prompt: Literal["completion", "chat"] | PromptFormat | None = None
    primer: str | None = None

    @classmethod
    def checked(cls, **values: Any) -> IndexSettings:
        """Like the constructor, but raises `CorpusError` with one sentence that names the field."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise CorpusError(first_problem(error)) from None


@contextmanager
def open_remotely(folder: Path, base_url: str) -> Iterator[tuple[RemoteEngine, Corpus]]:
    """Open the index in `folder` to ask a server of it (`lmcache-rag serve --index`).

    Raises:
        CorpusError: there is no index, or the server has another model.
        EngineError: no server answers.
    """
    folder = Path(folder).expanduser()
    manifest = Manifest.read(folder)
    if manifest is None:
        raise _no_index(folder)
    with RemoteEngine(base_url) as engine:
        _check_served(folder, manifest, engine)
        corpus = Corpus(folder, engine, SentenceEmbedder(manifest.embedding_model), manifest)
        try:
            yield engine, corpus
        finally:
            corpus.close()


@contextmanager
def open_corpus(
    folder: Path, settings: IndexSettings | None = None, *, create: bool = False, **engine: Any
) -> Iterator[tuple[LocalEngine, Corpus]]:
    """Start the engine of the index in `folder` and open the index; both are closed at the end.

    Args:
        create: make the index where there is none.
        engine: further fields of `EngineSettings`; compute type and codec are the index's own where not given.

    Raises:
        StoreError: the store is to be written to, and cannot be.
        CorpusError: there is no index, or it was made with something else than `settings` ask for.
    """
    settings = settings or IndexSettings()
    folder = Path(folder).expanduser()
    known = Manifest.read(folder)
    if known is None and not create:
        raise _no_index(folder)
    model = _model(settings.model) if settings.model else (known.model if known else EngineSettings.checked().model)
    if known is not None and model != known.model:
        raise CorpusError(
            f"The index {folder} was made with the model {known.model!r}: use that one, "
            "or index the documents into another folder."
        )
    of_environment = EngineSettings.checked()
    own_store = _absolute(of_environment.store) if "store" in of_environment.model_fields_set else OWN_STORE
    store = _store(settings, known, folder, own_store)
    namespace = settings.namespace or (known.namespace if known else of_environment.namespace)
    if known is not None:
        engine.setdefault("dtype", known.dtype)
        engine.setdefault("codec", known.codec)
    for name in (model, resolved(store, folder.absolute())):
        if printed(name) != name:
            raise CorpusError(f"{printed(name)} has a name that is not UTF-8: rename it, or name another folder.")
    engine_settings = EngineSettings.checked(model=model, store=resolved(store, folder), namespace=namespace, **engine)
    if create:  # before an engine is started for nothing
        check_writable(open_store(engine_settings.store, engine_settings.tiers))
    with LocalEngine(engine_settings) as started:
        manifest = _manifest(
            settings,
            known,
            started,
            model=model,
            model_fingerprint=started.model_fingerprint,
            dtype=started.dtype,
            tokenizer_fingerprint=started.tokenizer_fingerprint,
            namespace=namespace,
            store=store,
            codec=started.settings.codec,
        )
        corpus = Corpus(folder, started, SentenceEmbedder(manifest.embedding_model), manifest)
        try:
            yield started, corpus
        finally:
            corpus.close()


@contextmanager
def open_through(
    folder: Path, settings: IndexSettings | None, servers: Sequence[str]
) -> Iterator[tuple[RemoteEngine, Corpus]]:
    """Open the index in `folder`, or make one, to have servers (`lmcache-rag serve`) compute its KV. They have the same
    store, and let this client store.

    Raises:
        CorpusError: the index was made with something else than the servers have or `settings` ask for; or the servers
            differ in what they compute, or do not let this client store.
        EngineError: a server does not answer.
        StoreError: the store cannot be read from here, or written to.
    """
    settings, folder = settings or IndexSettings(), Path(folder).expanduser()
    known = Manifest.read(folder)
    with RemoteEngine(list(servers)) as engine:
        served = _served(servers)
        if known is not None:
            _check_served(folder, known, engine)
        store = _store(settings, known, folder, served["store"])
        namespace = settings.namespace or (known.namespace if known else served["namespace"])
        manifest = _manifest(
            settings,
            known,
            engine,
            model=known.model if known else served["model_path"],
            model_fingerprint=served["fingerprint"],
            dtype=served["dtype"],
            tokenizer_fingerprint=served["tokenizer_fingerprint"],
            namespace=namespace,
            store=store,
            codec=served["codec"],
        )
        stored = ChunkStores(open_store(resolved(store, folder)), served["fingerprint"], served["codec"]).of(namespace)
        computing = ServedComputing(engine, stored, served["kv_bytes_per_token"])
        corpus = Corpus(folder, engine, SentenceEmbedder(manifest.embedding_model), manifest, computing)
        try:
            yield engine, corpus
        finally:
            corpus.close()


def _served(servers: Sequence[str]) -> dict[str, Any]:
    """What all of the servers say that they are."""
    found = []
    for url in servers:
        with RemoteEngine(url) as one:
            found.append(one.get("/lmcache-rag/status"))
        if found[-1].get("namespace_per_salt"):
            raise CorpusError(
                f"The server at {url} gives each cache_salt a namespace of its own, and has none to index."
            )
        if not found[-1].get("may_store"):
            raise CorpusError(
                f"The server at {url} does not let this client store: start it with --ingest-key and set "
                f"{INGEST_KEY} to the same, or with --clients-precompute."
            )
        if "model_path" not in found[-1]:
            raise CorpusError(f"The server at {url} runs an earlier release of lmcache-rag: start it with this one.")
        for name in ("fingerprint", "codec", "namespace"):
            if found[-1][name] != found[0][name]:
                raise CorpusError(
                    f"The servers differ: {name} {found[0][name]} at {servers[0]}, {found[-1][name]} at {url}."
                )
    return dict(found[0])


def _check_served(folder: Path, manifest: Manifest, engine: RemoteEngine) -> None:
    """Raises `CorpusError` where an index was made with another model than a server has."""
    if engine.model_name == manifest.model:
        return
    fingerprint = engine.get("/lmcache-rag/status")["fingerprint"] if manifest.model_fingerprint else ""
    if not fingerprint or fingerprint != manifest.model_fingerprint:
        raise CorpusError(
            f"The server at {engine.settings.base_url[0]} serves {engine.model_name}, but the index {folder} was made "
            f"with {manifest.model}: start one with `lmcache-rag serve --index {folder}`."
        )


def _no_index(folder: Path) -> CorpusError:
    return CorpusError(f"There is no index in {folder}: run `lmcache-rag index PATH... --index {folder}` first.")


def _model(model: str) -> str:
    """A folder by its path from the root, so that the index can be used from anywhere; an id as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _embedding_model(settings: IndexSettings) -> str | None:
    return _model(settings.embedding_model) if settings.embedding_model else None


def _absolute(store: str) -> str:
    """A folder by its path from the root, for the same reason; a URI as it is."""
    return str(Path(store).expanduser().resolve()) if is_folder(store) else store


def _manifest(settings: IndexSettings, known: Manifest | None, engine: Engine, **fields: Any) -> Manifest:
    """What an index is to be made with: what its KV is computed with, and for the rest what is asked for, else what it
    was made with, else what is usual."""
    return Manifest(
        prompt=_prompt(settings, known, engine),
        primer=settings.primer if settings.primer is not None else (known.primer if known else None),
        primer_tokens=known.primer_tokens if known else None,
        primer_from="given" if settings.primer is not None else (known.primer_from if known else None),
        chunk_tokens=settings.chunk_tokens or (known.chunk_tokens if known else 512),
        overlap_tokens=_first(settings.overlap_tokens, known.overlap_tokens if known else None, 0),
        embedding_model=_embedding_model(settings) or (known.embedding_model if known else DEFAULT_EMBEDDING_MODEL),
        **fields,
    )


def _store(settings: IndexSettings, known: Manifest | None, folder: Path, default: str) -> str:
    """Where an index keeps its KV. Raises `CorpusError` where it is asked to be elsewhere than it is."""
    store = _absolute(settings.store) if settings.store else (known.store if known else default)
    if known is not None and store != known.store:
        raise CorpusError(
            f"The index {folder} keeps its KV in {known.store_uri(folder)}: leave --store out, "
            "or index the documents into another folder."
        )
    return store


def _prompt(settings: IndexSettings, known: Manifest | None, engine: Engine) -> PromptFormat:
    if isinstance(settings.prompt, PromptFormat):
        return settings.prompt
    if settings.prompt == "chat":
        return chat_format(engine.tokenizer)
    if settings.prompt is None and known is not None:
        return known.prompt
    return completion_format()


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
