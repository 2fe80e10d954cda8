"""An ingestion step that computes the KV of each node once."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.llms.lmcache_rag.base import LmcacheRag

from lmcache_rag.engine import PrecomputeReport, failures, precompute_texts
from lmcache_rag.errors import EngineError
from lmcache_rag.prompt import opening_ids

_log = logging.getLogger(__name__)


class KVPrecompute(TransformComponent):
    """Computes and stores the KV of each node, behind the text that stands before the nodes in a prompt.

    A node is computed as a query engine prompts it, `get_content(metadata_mode=MetadataMode.LLM)`, so this is the last
    step of a pipeline that changes text or metadata. Nodes pass unchanged, and one whose KV is stored costs nothing.
    One that cannot be stored, as it is longer than the model's context, is named in a warning, and by its number in
    `last_report.errors`.

    Args:
        llm: the model that will answer.
        prompt: the template that the query engine fills in, with the variable `{context_str}`; by default LlamaIndex's
            own for questions. Chunks are also reused behind other templates, with more repair.

    Raises:
        PromptError: no two prompts of the template begin alike.
    """

    scope: str = Field(description="Whose KV is computed: namespace, and fingerprint of the model.")
    store: str = Field(description="Where it is kept.")
    preamble: str = Field(description="The text it is computed behind.")

    _llm: LmcacheRag = PrivateAttr()
    _last_report: PrecomputeReport | None = PrivateAttr(default=None)

    def __init__(self, llm: LmcacheRag, prompt: BasePromptTemplate = DEFAULT_TEXT_QA_PROMPT_SEL) -> None:
        settings = llm.engine.settings
        fields: dict[str, Any] = {
            "scope": f"{settings.namespace}/{llm.engine.model_fingerprint}",
            "store": settings.store,
            "preamble": llm.preamble(prompt),
        }
        super().__init__(**fields)
        self._llm = llm

    @classmethod
    def class_name(cls) -> str:
        return "KVPrecompute"

    @property
    def last_report(self) -> PrecomputeReport | None:
        """What became of the nodes of the last call; None before the first."""
        return self._last_report

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        texts = [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
        preamble = opening_ids(self._llm.token_ids, self.preamble)
        self._last_report = report = precompute_texts(self._llm.engine, preamble, texts)
        if report.errors:
            names = [f"node {node.node_id}" for node in nodes]
            _log.warning("The KV of %d nodes is not stored: %s", len(report.errors), failures(report, names))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What a pipeline's cache knows this step by. It names the state of the store too, so that the cache never
        hides that stored KV is gone."""
        engine = self._llm.engine
        state = repr(engine.chunk_store().records.position)
        digest = hashlib.blake2b(state.encode(), digest_size=16).hexdigest()
        return {**super().to_dict(**kwargs), "stored": digest}

    def __getstate__(self) -> dict[str, Any]:
        """Refuses, since LlamaIndex would drop the engine and go on."""
        raise EngineError(
            "KVPrecompute holds an engine and cannot go to another process: run the pipeline without num_workers."
        )
