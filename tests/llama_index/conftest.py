"""A small LLM, a few nodes, and everything that LlamaIndex reports about LLM calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler

from ape_integrations.llama_index import APELLM
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model

TEXTS = (
    "The lamp of Amsel stands in the red room, where Dora reads at night.",
    "The boat of Birk lies in the north harbour and carries salt.",
    "The map of Corbin hangs in the hall. It shows two rivers and a mill.",
    "The ring of Dahl was found in the garden by a child.",
)


def make_nodes(**metadata: str) -> list[TextNode]:
    """Return a node for each text."""
    return [TextNode(text=text, id_=f"n{i}", metadata=metadata) for i, text in enumerate(TEXTS)]


class FixedRetriever(BaseRetriever):
    """Retrieves the same nodes whatever is asked, unless a question names the nodes it wants."""

    def __init__(self, nodes: Sequence[TextNode], wanted: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        self.nodes = nodes
        self.wanted = wanted

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=self.nodes[i], score=1.0 - i / 10) for i in self.wanted]


def window_engine(llm: APELLM, nodes: Sequence[TextNode]) -> RetrieverQueryEngine:
    """Return an engine that asks with each node's metadata "window" in the place of its text."""
    for node in nodes:
        node.excluded_llm_metadata_keys = ["window"]
    return RetrieverQueryEngine.from_args(
        FixedRetriever(nodes),
        llm=llm,
        node_postprocessors=[MetadataReplacementPostProcessor("window")],
    )


class Calls:
    """Start events, and responses of end events, of every LLM call since the last `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all calls."""
        self.starts: list[str] = []
        self.responses: list[Any] = []

    @property
    def reports(self) -> list[dict[str, Any]]:
        """What the cache did in each finished call."""
        return [response.raw["ape"] for response in self.responses]

    @property
    def with_contexts(self) -> list[dict[str, Any]]:
        """Reports of the calls whose prompt held retrieved text."""
        return [report for report in self.reports if report["contexts"]]


class _Recorder(BaseEventHandler):
    calls: Any

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        name = type(event).__name__
        if name in ("LLMChatStartEvent", "LLMCompletionStartEvent"):
            self.calls.starts.append(name)
        elif name in ("LLMChatEndEvent", "LLMCompletionEndEvent"):
            self.calls.responses.append(event.response)  # type: ignore[attr-defined]


@pytest.fixture
def calls() -> Iterator[Calls]:
    """Record the LLM calls of a test."""
    root, recorded = get_dispatcher(), Calls()
    recorder = _Recorder(calls=recorded)
    root.add_event_handler(recorder)
    yield recorded
    root.event_handlers = [h for h in root.event_handlers if h is not recorder]


@pytest.fixture(scope="session")
def model() -> Any:
    """Return a tiny random model with a long position limit."""
    return tiny_model(max_position_embeddings=8192)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Return a byte tokenizer with a chat template."""
    return byte_tokenizer()


@pytest.fixture
def make_llm(model: Any, tokenizer: Any) -> Callable[..., APELLM]:
    """Return a factory of LLMs over the tiny model, each with a store of its own."""

    def make(**changes: Any) -> APELLM:
        arguments = {
            "model": model,
            "tokenizer": tokenizer,
            "store": MemoryKVStore(),
            "max_new_tokens": 6,
            **changes,
        }
        return APELLM(**arguments)

    return make


@pytest.fixture
def llm(make_llm: Callable[..., APELLM]) -> APELLM:
    """Return an LLM with an empty store."""
    return make_llm()


def entries(llm: APELLM) -> int:
    """Return how many entries the LLM's store holds."""
    return llm.generator.store.stats().entries


def user(text: str) -> ChatMessage:
    """Return a user message."""
    return ChatMessage(role="user", content=text)
