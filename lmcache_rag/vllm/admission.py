"""What a request may ask for here, and which requests are handled at all."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lmcache_rag.request import INGEST_KEY, PARAMS_KEY, BlendOptions, ReuseReport, first_problem, grant_of
from lmcache_rag.vllm.config import ConnectorConfig

if TYPE_CHECKING:
    from vllm.v1.request import Request

_log = logging.getLogger(__name__)


def admitted(
    request: Request, report: ReuseReport, config: ConnectorConfig, unsupported: str = ""
) -> BlendOptions | None:
    """How the request is to be blended; None where it is not to be, as `report` says then.

    Args:
        unsupported: why no request of this engine is handled, or nothing.
    """
    try:
        given = _options_of(request)
        options = BlendOptions() if given is None else given
    except (ValidationError, TypeError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        report.reason = f"invalid options: {problem}"
        _log.warning("request %s passes through: %s", request.request_id, report.reason)
        return None
    if options.mode == "off":
        report.mode, report.reason = "off", "as asked"
        return None
    report.reason = unsupported or _unhandled(request) or _forbidden(request, options, config)
    if report.reason:
        return None
    if given is None and not config.automatic:
        report.reason = "no options given, and automatic matching is off"
        return None
    if config.namespace_per_salt:
        options = options.model_copy(update={"namespace": namespace_of_salt(str(request.cache_salt))})
    return options


def namespace_of_salt(cache_salt: str) -> str:
    """The namespace of those who know a cache salt, where each has its own."""
    return f"salt-{hashlib.blake2b(cache_salt.encode(), digest_size=16).hexdigest()}"


def _options_of(request: Request) -> BlendOptions | None:
    """What a request says about blending; None where it says nothing. Raises `ValidationError` and `TypeError`."""
    params: Any = request.kv_transfer_params or {}
    if not isinstance(params, dict):
        raise TypeError("kv_transfer_params is no object")
    given = params.get(PARAMS_KEY)
    return None if given is None else BlendOptions(**given)


def _forbidden(request: Request, options: BlendOptions, config: ConnectorConfig) -> str:
    """What a client asks for and the operator has not allowed, or nothing."""
    if config.namespace_per_salt:
        if options.namespace is not None:
            return "clients may not choose a namespace here: each cache_salt has its own"
        if not request.cache_salt:
            return "no cache_salt: each has a namespace of its own here (namespace_per_salt)"
    elif options.namespace not in (None, config.namespace) and not config.clients_choose_namespace:
        return "clients may not choose a namespace here: the connector's clients_choose_namespace allows it"
    if options.mode == "precompute" and not config.clients_precompute:
        return "clients may not store KV here: the connector's clients_precompute allows it"
    if options.mode == "precompute" and config.ingest_key and not _is_granted(options):
        return "storing KV takes the server's ingest key"
    return ""


def _is_granted(options: BlendOptions) -> bool:
    """Whether the client has shown the ingest key to the server's middleware. That alone sees headers, but the engine
    sees all requests."""
    key, given = os.environ.get(INGEST_KEY), (options.grant or "").encode(errors="replace")
    return bool(key) and hmac.compare_digest(given, grant_of(str(key)).encode())


def _unhandled(request: Request) -> str:
    """Why a request passes through untouched, or nothing."""
    if request.mm_features:
        return "multimodal input"
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return "prompt embeddings"
    if request.pooling_params is not None:
        return "pooling"
    if request.resumable:
        return "streaming input"
    if request.skip_reading_prefix_cache:
        return "prompt logprobs, or reading caches is off"
    return ""
