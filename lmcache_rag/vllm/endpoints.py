"""`/lmcache-rag/...` of a server: what is stored, and letting clients that may store keep and release chunks."""

from __future__ import annotations

import asyncio
import functools
import hmac
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.v1.metrics.prometheus import get_prometheus_registry

import lmcache_rag
from lmcache_rag.chunk_kv import KVShape, key_of, variant_of
from lmcache_rag.codec import coded_bytes
from lmcache_rag.errors import StoreError
from lmcache_rag.library.chunks import ChunkStore, ChunkStores
from lmcache_rag.library.contents import figures
from lmcache_rag.model import tokenizer_fingerprint
from lmcache_rag.request import NAMESPACE_PATTERN, STORE_FAILED, first_problem
from lmcache_rag.vllm.admission import namespace_of_salt
from lmcache_rag.vllm.config import ConnectorConfig, fingerprint_of, model_folder
from lmcache_rag.vllm.metrics import totals

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "/lmcache-rag/"


class RefusedError(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        param: the field that is wrong, if one is.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class _Chunks(BaseModel):
    """What is asked about chunks.

    Attributes:
        owner: who keeps or releases them.
        preamble, primer: what they were computed behind.
        cache_salt: of the client, where each salt has a namespace of its own.
        namespace: another than the server's, where clients may choose.
    """

    model_config = ConfigDict(extra="forbid")

    chunks: list[list[int]] = Field(max_length=65536)
    owner: str = Field(default="clients", min_length=1, max_length=1024)
    preamble: list[int] = []
    primer: list[int] = []
    cache_salt: str | None = None
    namespace: str | None = Field(default=None, pattern=NAMESPACE_PATTERN)


class Endpoints:
    """Of one server; opens its store when first asked.

    - `GET /lmcache-rag/status`: what is served and stored.
    - `POST /lmcache-rag/missing`: numbers of the chunks that are not stored behind a preamble and a primer.
    - `POST /lmcache-rag/own`, `/lmcache-rag/release`: keep chunks until they are released.

    The last three are for clients that may store.
    """

    def __init__(self) -> None:
        self._server: _Server | None = None

    async def answer(
        self, scope: MutableMapping[str, Any], path: str, request: Mapping[str, Any], *, may_store: bool
    ) -> dict[str, Any]:
        """What an endpoint says. Raises `RefusedError`."""
        name, server = path.removeprefix(PREFIX), self._of(scope)
        if name == "status":
            return await asyncio.to_thread(_guarded, functools.partial(server.status, may_store=may_store))
        does = {"missing": server.missing, "own": server.own, "release": server.release}.get(name)
        if does is None:
            raise RefusedError(404, f"There is no {path}.")
        self.check_may_store(scope, may_store=may_store)
        return await asyncio.to_thread(_guarded, lambda: does(_checked(request)))

    def check_may_store(self, scope: MutableMapping[str, Any], *, may_store: bool) -> None:
        """Raises `RefusedError` where a client may not store KV."""
        if not self._of(scope).config.clients_precompute:
            raise RefusedError(
                403, "Clients may not store KV here: start the server with --ingest-key or --clients-precompute."
            )
        if not may_store:
            raise RefusedError(
                403, "Storing KV takes the server's ingest key (X-LMCache-RAG-Ingest-Key), and it is not this."
            )

    def _of(self, scope: MutableMapping[str, Any]) -> _Server:
        if self._server is None:
            self._server = _Server(scope["app"].state.vllm_config)
        return self._server


class _Server:
    """The served model and its store."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.config = ConnectorConfig.of(vllm_config)
        self._model = vllm_config.model_config
        self._vllm_config = vllm_config

    @functools.cached_property
    def _chunks(self) -> ChunkStores:
        return ChunkStores(
            self.config.open_store(), self._fingerprint, self.config.codec, extra=self.config.extra_codecs
        )

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(self._vllm_config)

    @functools.cached_property
    def _computing(self) -> dict[str, Any]:
        """What those need to know who have an index computed here."""
        model = self._model
        layers = model.get_num_layers(self._vllm_config.parallel_config)
        shape = KVShape(layers, model.get_total_num_kv_heads(), model.get_head_size(), model.dtype)
        return {
            "model_path": model.model,
            "tokenizer_fingerprint": tokenizer_fingerprint(model_folder(self._vllm_config)),
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_bytes_per_token": coded_bytes(shape, (self.config.codec, *self.config.extra_codecs)),
        }

    def status(self, *, may_store: bool) -> dict[str, Any]:
        """What is served and stored, and was reused since the start; of what tenants' namespaces hold nothing."""
        config = self.config
        status = {
            "version": lmcache_rag.__version__,
            "model": self._model.served_model_name or self._model.model,
            "max_model_len": self._model.max_model_len,
            "fingerprint": self._fingerprint,
            "codec": config.codec,
            "calls_tools": config.offers_tools,
            "may_store": config.clients_precompute and may_store,
            "namespace_per_salt": config.namespace_per_salt,
            "totals": totals(get_prometheus_registry()),
        }
        if status["may_store"]:
            status |= self._computing
        if not config.namespace_per_salt:
            chunks = self._chunks.of(config.namespace)
            chunks.refresh()
            found = figures(chunks.store, chunks.scope, chunks.records)
            status |= {"store": config.store, "namespace": config.namespace}
            status |= {name: found[name] for name in ("chunks", "tokens", "bytes")}
        return status

    def missing(self, asked: _Chunks) -> dict[str, Any]:
        """Numbers of the chunks of which a variant is not stored."""
        stored = self._stored(asked)
        variants = {variant_of(asked.preamble)} | (
            {variant_of(asked.preamble, asked.primer)} if asked.primer else set()
        )
        if asked.preamble and stored.lacks_preamble(asked.preamble):
            return {"missing": list(range(len(asked.chunks)))}
        return {"missing": [number for number, chunk in enumerate(asked.chunks) if _lacks(stored, chunk, variants)]}

    def own(self, asked: _Chunks) -> dict[str, Any]:
        self._stored(asked).own(asked.owner, map(key_of, asked.chunks))
        return {}

    def release(self, asked: _Chunks) -> dict[str, Any]:
        self._stored(asked).release(asked.owner, map(key_of, asked.chunks))
        return {}

    def _stored(self, asked: _Chunks) -> ChunkStore:
        namespace = self.config.namespace
        if self.config.namespace_per_salt:
            if not asked.cache_salt:
                raise RefusedError(400, "cache_salt: each has a namespace of its own here; give yours.", "cache_salt")
            namespace = namespace_of_salt(asked.cache_salt)
        elif asked.namespace not in (None, namespace):
            if not self.config.clients_choose_namespace:
                raise RefusedError(403, "Clients may not choose a namespace here.", "namespace")
            namespace = str(asked.namespace)
        chunks = self._chunks.of(namespace)
        chunks.refresh()
        return chunks


def _lacks(stored: ChunkStore, chunk: Sequence[int], variants: set[str]) -> bool:
    return any(stored.missing(chunk, variant) for variant in variants)


def _guarded(does: Any) -> Any:
    """What is done with the store, its failures as refusals."""
    try:
        return does()
    except StoreError as error:
        raise RefusedError(STORE_FAILED, str(error)) from error


def _checked(request: Mapping[str, Any]) -> _Chunks:
    try:
        return _Chunks(**request)
    except ValidationError as error:
        raise RefusedError(400, first_problem(error)) from None


def check_request(scope: MutableMapping[str, Any], path: str) -> None:
    """Before a request is read: who asks, and in which form. Raises `RefusedError`."""
    if not has_api_key(scope):
        raise RefusedError(401, "The server's key is needed: Authorization: Bearer KEY.")
    if path == f"{PREFIX}status":
        return
    if scope["method"] != "POST" or header_of(scope, b"content-type").partition(b";")[0].strip() != b"application/json":
        raise RefusedError(415, f"{path} takes JSON, by POST.")


def has_api_key(scope: MutableMapping[str, Any]) -> bool:
    """Whether the client has shown the server's key, or needs none. vLLM itself asks for it under /v1 only."""
    from vllm import envs

    keys = [key for key in (scope["app"].state.args.api_key or [envs.VLLM_API_KEY]) if key]
    scheme, _, given = header_of(scope, b"authorization").partition(b" ")
    return not keys or (scheme.lower() == b"bearer" and any(hmac.compare_digest(given, key.encode()) for key in keys))


def header_of(scope: MutableMapping[str, Any], name: bytes) -> bytes:
    """The value of a header, by its name in small letters; empty where it is not there."""
    return next((bytes(value) for header, value in scope["headers"] if header.lower() == name), b"")
