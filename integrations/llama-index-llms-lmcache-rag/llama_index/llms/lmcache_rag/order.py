"""A postprocessor that keeps the nodes' order from prompt to prompt."""

from __future__ import annotations

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from lmcache_rag.conversation.order import PassageOrder


class KeepOrder(BaseNodePostprocessor):
    """Puts retrieved nodes into the order of earlier prompts, as far as they are the same from the first on, so that
    their KV is found in the prefix cache; the others follow by score. Leave it out where the order means something. Use
    it as the last of an engine's `node_postprocessors`.

    Attributes:
        most_moved: no node comes more places earlier or later than its score says.
    """

    most_moved: int = 4

    _order: PassageOrder = PrivateAttr()

    def model_post_init(self, context: object, /) -> None:
        super().model_post_init(context)
        self._order = PassageOrder(self.most_moved)

    @classmethod
    def class_name(cls) -> str:
        return "KeepOrder"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return self._order.ordered(nodes, key=lambda node: node.node.get_content(MetadataMode.LLM))
