"""A postprocessor that has the KV of retrieved nodes brought nearer before the model is asked."""

from __future__ import annotations

import logging

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.llms.lmcache_rag.base import LmcacheRag
from llama_index.llms.lmcache_rag.copies import Copyable

from lmcache_rag.engine import prefetch_texts
from lmcache_rag.errors import StoreError

_log = logging.getLogger(__name__)


class KVPrefetch(Copyable, BaseNodePostprocessor):
    """Has what is stored of retrieved nodes read from a slow store into its caches, in the background, while the
    prompt is still being made. Nodes pass unchanged. For engines in this process on a store in a bucket or in Redis,
    with `tiers` before it; a server sees to its own caches. Use it as the last of an engine's `node_postprocessors`.

    Args:
        llm: the model that will answer.
    """

    _llm: LmcacheRag = PrivateAttr()

    def __init__(self, llm: LmcacheRag) -> None:
        super().__init__()
        self._llm = llm

    @classmethod
    def class_name(cls) -> str:
        return "KVPrefetch"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        try:
            prefetch_texts(self._llm.engine, [node.node.get_content(MetadataMode.LLM) for node in nodes])
        except StoreError as error:  # the answer does not depend on it
            _log.warning("What is stored of the nodes is not brought nearer (%s)", error)
        return nodes
