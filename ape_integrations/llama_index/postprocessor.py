"""A node postprocessor that starts loading states as soon as nodes are retrieved."""

from __future__ import annotations

from llama_index.core.bridge.pydantic import Field, PrivateAttr, SerializeAsAny
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from ape_integrations.llama_index.capture import node_text
from ape_integrations.llama_index.lazy import Pipeline
from ape_integrations.llama_index.llm import APELLM


class APENodePostprocessor(BaseNodePostprocessor):
    """Makes retrieved nodes known to an `APELLM` and starts loading or encoding them.

    Returns at once and leaves the nodes as they are. It must be the last postprocessor, because
    it expects the nodes to enter the prompt as it sees them. Where the engine labels or cuts them
    afterwards (as ``CitationQueryEngine`` does), it only makes them known.

    Its first request brings stored states to memory, for LlamaIndex's default prompt; what the
    pipeline's prompt looks like is learned from that request. From the second on, missing states
    are encoded in the background too.

    Parameters
    ----------
    llm : APELLM
        The LLM that will read the nodes. A model that is not loaded yet starts loading.
    """

    llm: SerializeAsAny[APELLM] = Field(description="The LLM that will read the nodes.")

    _pipeline: Pipeline = PrivateAttr(default_factory=Pipeline)

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises the postprocessor."""
        return "APENodePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        texts = [text for text in map(node_text, nodes) if text]
        query = query_bundle.query_str if query_bundle else None
        self.llm.register_contexts(nodes, query)
        if texts:
            self.llm.prefetch(texts, self._pipeline)
        return nodes
