"""An ingestion step that computes the KV of each node once."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.llms.lmcache_rag.base import LmcacheRag
from llama_index.llms.lmcache_rag.copies import Copyable
from tqdm.auto import tqdm

from lmcache_rag.engine import PrecomputeReport, failures, precompute_texts
from lmcache_rag.engine.texts import FRAMEWORKS
from lmcache_rag.prompt import opening_ids

_log = logging.getLogger(__name__)


class KVPrecompute(Copyable, TransformComponent):
    """Computes and stores the KV of each node, behind the text that stands before the nodes in a prompt.

    A node is computed as a query engine prompts it, `get_content(metadata_mode=MetadataMode.LLM)`, so this is the last
    step of a pipeline that changes text or metadata. Nodes pass unchanged, and one whose KV is stored costs nothing.
    One that cannot be stored, as it is longer than the model's context, is named in a warning, and by its number in
    `last_report.errors`; one that is too short to be found in prompts is left out.

    Over a server, a pipeline may run it in several processes (`num_workers`); reports then stay in them.

    Args:
        llm: the model that will answer.
        prompt: the template that the query engine fills in, with the variable `{context_str}`; by default LlamaIndex's
            own for questions. Chunks are also reused behind other templates, with more repair.
        target_metadata_key: what a `MetadataReplacementPostProcessor` puts in the place of the nodes' text, such as
            "window" of sentence windows.
        show_progress: a bar with an estimate; a call's own `show_progress` goes before.

    Raises:
        PromptError: no two prompts of the template begin alike.
        EngineError: when copied or pickled: the engine runs in this process.
    """

    scope: str = Field(description="Whose KV is computed, and where it is kept.")
    preamble: str = Field(description="The text it is computed behind.")
    target_metadata_key: str | None = Field(default=None, description="Metadata that is prompted instead of the text.")
    show_progress: bool = Field(default=False, exclude=True)

    _llm: LmcacheRag = PrivateAttr()
    _last_report: PrecomputeReport | None = PrivateAttr(default=None)

    def __init__(
        self,
        llm: LmcacheRag,
        prompt: BasePromptTemplate = DEFAULT_TEXT_QA_PROMPT_SEL,
        *,
        target_metadata_key: str | None = None,
        show_progress: bool = False,
    ) -> None:
        fields: dict[str, Any] = {
            "scope": llm.engine.scope,
            "preamble": llm.preamble(prompt),
            "target_metadata_key": target_metadata_key,
            "show_progress": show_progress,
        }
        super().__init__(**fields)
        self._llm = llm

    @classmethod
    def class_name(cls) -> str:
        return "KVPrecompute"

    @property
    def llm(self) -> LmcacheRag:
        """The model that will answer."""
        return self._llm

    @property
    def last_report(self) -> PrecomputeReport | None:
        """What became of the nodes of the last call; None before the first."""
        return self._last_report

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        self.compute(nodes, show_progress=kwargs.get("show_progress"))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def text_of(self, node: BaseNode) -> str:
        """What a query engine writes into a prompt for a node."""
        if self.target_metadata_key is not None:
            text = node.metadata.get(self.target_metadata_key)
            node = node.model_copy()
            node.set_content(node.get_content(metadata_mode=MetadataMode.NONE) if text is None else text)
        return node.get_content(metadata_mode=MetadataMode.LLM)

    def compute(
        self, nodes: Sequence[BaseNode], *, owner: str = FRAMEWORKS, show_progress: bool | None = None
    ) -> PrecomputeReport:
        """Compute and store what is missing; `owner` keeps it until it releases it.

        Raises:
            StoreError: the store cannot be read or written to.
        """
        texts = [self.text_of(node) for node in nodes]
        hidden = not (self.show_progress if show_progress is None else show_progress)
        preamble = opening_ids(self._llm.token_ids, self.preamble)
        with tqdm(total=len(texts), desc="Computing KV", unit="node", disable=hidden) as bar:
            report = precompute_texts(
                self._llm.engine, preamble, texts, progress=lambda _tokens: bar.update(), owner=owner
            )
            bar.update(bar.total - bar.n)  # those that cost nothing
        self._last_report = report
        if report.errors:
            names = [f"node {node.node_id}" for node in nodes]
            _log.warning("The KV of %d nodes is not stored: %s", len(report.errors), failures(report, names))
        return report

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What a pipeline's cache knows this step by. Of an engine in this process it names what is stored too, so that
        the cache does not hide that the store was emptied: an empty store is another one each time. Where the store
        is again what it was before these nodes were computed, as some were evicted, the cache hides it."""
        stored = getattr(self._llm.engine, "chunk_store", None)  # servers do not say what they have
        state = {} if stored is None else {"stored": stored().state(FRAMEWORKS) or uuid.uuid4().hex}
        return {**super().to_dict(**kwargs), **state}
