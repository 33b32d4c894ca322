"""An ingestion transformation that encodes nodes ahead of the first question."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.schema import BaseNode, TransformComponent

from ape_integrations.llama_index.capture import node_text
from ape_integrations.llama_index.llm import APELLM
from ape_integrations.llama_index.prefixes import shared_prefixes


class APECacheWarmer(TransformComponent):
    """Encodes nodes into the store of an `APELLM`, so that the first question finds them.

    Use it as the last transformation of an ``IngestionPipeline`` or of
    ``VectorStoreIndex.from_documents(transformations=[...])``: behind whatever cuts documents to
    nodes or changes their metadata. Nodes pass through unchanged.

    States depend on the text before them, so it must be known which prompt the pipeline will use.

    With ``num_workers > 1`` every worker process loads the model by its name. A hit of an
    ``IngestionCache`` skips transformations, this one too: what was evicted since is then encoded
    at first use, or by calling the warmer with the nodes.

    Parameters
    ----------
    llm : APELLM
        The LLM that will read the nodes.
    prompt : optional
        The prompt that will hold them: a prompt template, a query engine, a response synthesizer,
        a chat engine, the text before the first node as a string, or a sequence of these (each
        further prefix costs the same time and space again). None: LlamaIndex's default
        question-answering prompt. Of an engine, the prompts that it asks first are taken, or those
        of the engines that it passes questions on to; to warm a refine prompt as well, name its
        template.
    show_progress : bool
        Show a progress bar.

    Raises
    ------
    ConfigError
        When it runs: the prompt cannot be read, has no variable for retrieved text, or comes from
        an engine whose texts nobody knows before they are retrieved (``CitationQueryEngine``).
    """

    llm: SerializeAsAny[APELLM] = Field(description="The LLM that will read the nodes.")
    prompt: Any = Field(default=None, exclude=True, description="The prompt that will hold them.")
    show_progress: bool = Field(default=True, description="Show a progress bar.")

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises the transformation."""
        return "APECacheWarmer"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Describe the warmer; an ``IngestionCache`` takes equal descriptions for equal work."""
        data = super().to_dict(**kwargs)
        data["reads"] = self.llm.identity()
        if self.prompt is not None:
            data["prefixes"] = shared_prefixes(self.llm, self.prompt)
        return data

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: names, and prefixes instead of engines."""
        prompt = None if self.prompt is None else shared_prefixes(self.llm, self.prompt)
        return {
            "__dict__": {"llm": self.llm, "prompt": prompt, "show_progress": self.show_progress},
            "__pydantic_fields_set__": {"llm", "prompt", "show_progress"},
            "__pydantic_extra__": None,
            "__pydantic_private__": None,
        }

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Encode the nodes that the store lacks, and return all of them."""
        texts = [text for text in map(node_text, nodes) if text]
        if texts:
            for prefix in shared_prefixes(self.llm, self.prompt):
                self.llm.generator.warm(prefix, texts, show_progress=self.show_progress)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As calling it, without blocking the event loop."""
        return await asyncio.to_thread(self, nodes, **kwargs)
