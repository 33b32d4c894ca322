"""Retrieved documents reach the model without a line of user code."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from pydantic import BaseModel
from typing_extensions import TypedDict

from ape_integrations import APELanguageModel, ChatAPE, MemoryKVStore
from ape_integrations.core.config import APEConfig
from ape_integrations.core.loading import bundled_model
from ape_integrations.langchain import engine
from ape_integrations.langchain.capture import capture_hook
from ape_integrations.langchain.documents import documents_within, question_in
from ape_integrations.langchain.engine import engines
from tests.langchain.helpers import (
    DOCUMENTS,
    QUESTIONS,
    TEXTS,
    Calls,
    WordRetriever,
    format_docs,
    loaded_model,
    loaded_tokenizer,
    tiny_chat,
)
from tests.langchain.pipelines import lcel


class FailingRetriever(BaseRetriever):
    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        raise ConnectionError("no index")


def test_documents_and_query_of_any_retriever_are_registered() -> None:
    chat = tiny_chat()
    assert len(chat.generator.registry) == 0
    documents = WordRetriever().invoke(QUESTIONS[0])
    registry = chat.generator.registry
    assert len(registry) == len(documents)
    assert QUESTIONS[0] in registry.queries()


def test_scores_of_rerankers_choose_the_documents() -> None:
    """Rerankers leave them in the metadata; documents without one are not compared."""
    chat, calls = tiny_chat(ape_config=APEConfig(max_contexts=1)), Calls()

    class Reranked(WordRetriever):
        def _get_relevant_documents(
            self, query: str, *, run_manager: CallbackManagerForRetrieverRun
        ) -> list[Document]:
            found = super()._get_relevant_documents(query, run_manager=run_manager)
            return [
                Document(d.page_content, metadata={"relevance_score": float(rank)})
                for rank, d in enumerate(found)
            ]

    lcel(chat, Reranked()).invoke(QUESTIONS[0], {"callbacks": [calls]})
    [report] = calls.reports
    assert (report["contexts"], report["dropped"], report["misses"]) == (1, 2, 1)
    texts = [document.page_content for document in WordRetriever().invoke(QUESTIONS[0])]
    assert chat.generator.registry.scores(texts, QUESTIONS[0]) == [0.0, 1.0, 2.0]


def test_async_and_threaded_retrievers_are_captured() -> None:
    chat = tiny_chat()
    asyncio.run(WordRetriever(k=1).ainvoke(QUESTIONS[0]))
    assert len(chat.generator.registry) == 1
    thread = threading.Thread(target=lambda: WordRetriever(k=2).invoke(QUESTIONS[0]))
    thread.start()
    thread.join()
    assert len(chat.generator.registry) == 2


def test_documents_retrieved_before_the_model_is_loaded_are_not_lost() -> None:
    chat = tiny_chat()
    WordRetriever().invoke(QUESTIONS[0])
    assert chat._engine._generator is None
    assert len(chat.generator.registry) == 3


def test_capture_can_be_switched_off_per_model() -> None:
    store = MemoryKVStore()
    on, off = tiny_chat(store=store), tiny_chat(store=store, capture=False)
    calls = {True: Calls(), False: Calls()}
    for chat in (on, off):
        chain = lcel(chat, WordRetriever())
        chain.invoke(QUESTIONS[0], {"callbacks": [calls[chat.capture]]})
    assert calls[True].total("contexts") == 3
    assert calls[False].total("contexts") == 0


def test_completion_model_is_served_too() -> None:
    model = APELanguageModel(
        model=loaded_model(),
        tokenizer=loaded_tokenizer(),
        store=MemoryKVStore(),
        temperature=0,
        max_tokens=4,
    )
    calls = Calls()
    for _ in range(2):
        lcel(model, WordRetriever()).invoke(QUESTIONS[0], {"callbacks": [calls]})  # type: ignore[arg-type]
    assert [report["hits"] for report in calls.reports] == [0, 3]


class State(TypedDict):
    question: str
    context: list[Document]
    answer: str


def _graph(chat: ChatAPE, carried: Callable[[list[Document]], Any], **options: Any) -> Any:
    """Return the graph of LangGraph's tutorial, with a search that is no retriever."""

    def retrieve(state: State) -> dict[str, Any]:
        return {"context": carried(_search(state["question"]))}

    def generate(state: State) -> dict[str, Any]:
        found = format_docs(list(documents_within(state["context"])))
        answer = chat.invoke(f"Be brief.\nQuestion: {state['question']}\nContext: {found}\nAnswer:")
        report = answer.response_metadata["ape"]
        return {"answer": f"{report['hits']} of {report['contexts']}"}

    graph = StateGraph(State).add_sequence([retrieve, generate]).add_edge(START, "retrieve")
    return graph.compile(**options)


def _search(question: str) -> list[Document]:
    return WordRetriever()._get_relevant_documents(question, run_manager=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "carried",
    [
        lambda documents: documents,
        lambda documents: {"found": {"documents": documents}},
        lambda documents: [(document, 0.5) for document in documents],
    ],
)
def test_documents_in_the_state_of_a_graph_are_recognised(
    carried: Callable[[list[Document]], Any],
) -> None:
    """As in LangGraph's tutorial, whose search of a vector store fires no event."""
    graph = _graph(tiny_chat(), carried)
    assert graph.invoke({"question": QUESTIONS[0]})["answer"] == "0 of 3"
    # Another question about the same documents, which stands before them in the prompt.
    assert graph.invoke({"question": f"{QUESTIONS[0]} And why?"})["answer"] == "3 of 3"


def test_graph_that_is_resumed_by_another_process_finds_its_documents(tmp_path: Any) -> None:
    memory, config = InMemorySaver(), {"configurable": {"thread_id": "1"}}
    options = {"checkpointer": memory, "interrupt_before": ["generate"]}
    _graph(tiny_chat(), lambda documents: documents, **options).invoke(
        {"question": QUESTIONS[0]}, config
    )
    gc.collect()
    _forget_everything()
    graph = _graph(tiny_chat(), lambda documents: documents, **options)
    assert graph.invoke(None, config)["answer"] == "0 of 3"


@pytest.mark.parametrize(
    "artifact",
    [
        list(DOCUMENTS[:2]),
        {"documents": DOCUMENTS[:2]},
        [(DOCUMENTS[0], 0.5), (DOCUMENTS[1], 0.4)],
    ],
)
def test_documents_that_a_tool_hands_over_are_recognised(artifact: Any) -> None:
    _forget_everything()
    call = {"name": "search", "args": {}, "id": "1"}
    messages = [
        HumanMessage("Who?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage(format_docs(list(DOCUMENTS[:2])), tool_call_id="1", artifact=artifact),
    ]
    answer = tiny_chat(tools=True).invoke(messages)
    assert answer.response_metadata["ape"]["contexts"] == 2


def test_documents_within_a_value_are_found_up_to_a_depth() -> None:
    class Model(BaseModel):
        documents: list[Any]

    @dataclasses.dataclass
    class Update:
        update: Any

    one = DOCUMENTS[0]
    for value in (one, [one], {"a": ({"b": one},)}, Model(documents=[one]), Update({"c": [one]})):
        assert list(documents_within(value)) == [one]
    for value in ("text", 7, None, HumanMessage("text"), [[[[[[one]]]]]], Document):
        assert list(documents_within(value)) == []
    endless: list[Any] = []
    endless.append(endless)
    assert list(documents_within(endless)) == []


def test_question_of_a_run_is_what_it_was_given() -> None:
    asked = "How tall is it?"
    spoken = [HumanMessage("Hello"), AIMessage("Yes?"), HumanMessage(asked), AIMessage("", id="1")]
    for given in (
        asked,
        {"question": asked},
        {"input": asked, "k": 3},
        spoken,
        {"messages": spoken},
    ):
        assert question_in(given) == asked
    for other in ("", "long " * 300, 7, None, {"language": "English"}, [], {"messages": []}):
        assert question_in(other) is None


def test_question_of_the_nearest_run_is_that_of_its_documents() -> None:
    """Not a prompt that was made of both."""
    chat = tiny_chat()

    def joined(state: dict[str, Any]) -> dict[str, Any]:
        return {"question": f"{TEXTS[0]}\n{state['question']}", "context": [DOCUMENTS[0]]}

    chain = RunnableLambda(joined) | RunnableLambda(lambda state: state["context"])
    chain.invoke({"question": QUESTIONS[0]})
    registry = chat.generator.registry
    assert registry.knows([TEXTS[0]])
    assert registry.queries() == (QUESTIONS[0],)


def _forget_everything() -> None:
    """Make this process one that has captured nothing."""
    engine._recent.clear()


def test_failing_retriever_raises_and_leaves_nothing_behind() -> None:
    hook = capture_hook.get()
    assert hook is not None
    with pytest.raises(ConnectionError):
        FailingRetriever().invoke("anything")
    assert not hook._queries
    WordRetriever().invoke(QUESTIONS[0])
    assert not hook._queries


def test_model_that_is_named_after_the_retrieval_knows_it() -> None:
    documents = WordRetriever().invoke(QUESTIONS[0])
    chat = tiny_chat()
    assert len(chat.generator.registry) == len(documents)


def test_closed_model_keeps_nothing_from_the_others() -> None:
    closed, open_ = tiny_chat(), tiny_chat()
    lcel(closed, WordRetriever()).invoke(QUESTIONS[0])
    closed.generator.close()
    for chat in (closed, open_):
        calls = Calls()
        lcel(chat, WordRetriever()).invoke(QUESTIONS[1], {"callbacks": [calls]})
        assert calls.total("contexts") == 3


def configured(chat: ChatAPE, scales: Sequence[float]) -> list[Any]:
    """Ask once per scaling factor and return the reports."""
    calls = Calls()
    chain = lcel(chat.configurable_fields(scaling_factor=ConfigurableField("S")), WordRetriever())  # type: ignore[arg-type]
    for scale in scales:
        chain.invoke(QUESTIONS[0], {"configurable": {"S": scale}, "callbacks": [calls]})
    return calls.reports


def test_configured_copies_know_what_was_retrieved_and_keep_their_engines(tmp_path: Any) -> None:
    chat = tiny_chat(cache_dir=str(tmp_path))
    reports = configured(chat, [1.0, 0.8, 1.0, 0.8])
    assert [report["contexts"] for report in reports] == [3] * 4
    assert [report["hits"] for report in reports] == [0, 3, 3, 3]
    gc.collect()
    mine = [engine for engine in engines() if engine.settings.store == str(tmp_path)]
    assert sorted(e.settings.config.scaling_factor for e in mine if e.parts) == [0.8, 1.0]


def test_engines_that_differ_in_settings_alone_load_a_model_once() -> None:
    name = str(bundled_model())
    first, second = (ChatAPE(model=name, scaling_factor=s, store=MemoryKVStore()) for s in (1, 0.8))
    assert first.generator is not second.generator
    assert first.generator.model is second.generator.model


def test_engines_of_configured_copies_are_not_kept_without_end() -> None:
    chat = tiny_chat(store=MemoryKVStore())
    configured(chat, [0.5 + number / 20 for number in range(9)])
    gc.collect()
    mine = [engine for engine in engines() if engine.settings.store is chat.store]
    assert len([engine for engine in mine if engine.parts]) == 4


def test_configured_copy_may_name_another_model() -> None:
    chat = tiny_chat()
    fields = {name: getattr(chat, name) for name in type(chat).model_fields}
    assert type(chat)(**fields).generator is chat.generator
    assert type(chat)(**{**fields, "model": "another"}).loaded is None


def test_models_that_nobody_holds_are_forgotten() -> None:
    chat = tiny_chat()
    generator = weakref.ref(chat.generator)
    assert any(engine is chat._engine for engine in engines())
    del chat
    gc.collect()
    assert generator() is None


def test_nested_retrieval_inside_a_function_is_captured() -> None:
    chat, calls = tiny_chat(), Calls()
    retriever = WordRetriever()

    def answer(question: str) -> Any:
        documents = retriever.invoke(question)
        return chat.invoke("\n\n".join([*(d.page_content for d in documents), question]))

    RunnableLambda(answer).invoke(QUESTIONS[0], {"callbacks": [calls]})
    assert calls.total("contexts") == 3


def test_prefetch_brings_stored_states_back_before_the_request(tmp_path: Any) -> None:
    chat = tiny_chat(cache_dir=str(tmp_path))
    chain = lcel(chat, WordRetriever())
    chain.invoke(QUESTIONS[0])
    store = chat.generator.store
    store.flush()
    hits = store.stats().hits
    WordRetriever().invoke(QUESTIONS[0])
    chat.generator.close()  # waits for the background
    assert store.stats().hits >= hits + 3


def test_document_that_is_part_of_the_question_stays_there() -> None:
    chat, calls = tiny_chat(), Calls()
    retriever = WordRetriever(documents=(Document("Aldor"), Document(TEXTS[0])), k=2)
    lcel(chat, retriever).invoke("What is Aldor", {"callbacks": [calls]})
    assert calls.total("contexts") == 2
