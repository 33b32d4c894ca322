"""APEDocumentCompressor passes documents through, registers them, and warms the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from langchain_core.exceptions import OutputParserException
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from pydantic import BaseModel

from ape_integrations import APEDocumentCompressor, APELanguageModel, ChatAPE, MemoryKVStore
from ape_integrations.errors import ConfigError
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
from tests.langchain.pipelines import (
    ANSWER_PROMPT,
    QUESTION_FIRST_PROMPT,
    lcel,
    question_first,
    retrieval_with_history,
    stuff,
)


def compressor_of(model: Any) -> APEDocumentCompressor:
    return APEDocumentCompressor(model=model)


def test_is_compressor_and_transformer_and_changes_nothing() -> None:
    compressor = compressor_of(tiny_chat())
    assert isinstance(compressor, BaseDocumentCompressor)
    assert isinstance(compressor, BaseDocumentTransformer)
    documents = list(DOCUMENTS)
    before = [document.model_copy(deep=True) for document in documents]
    ways = (
        compressor.compress_documents(documents, QUESTIONS[0]),
        compressor.transform_documents(documents),
        asyncio.run(compressor.acompress_documents(documents, QUESTIONS[0])),  # type: ignore[arg-type]
        asyncio.run(compressor.atransform_documents(documents)),  # type: ignore[arg-type]
    )
    for passed in ways:
        assert all(out is document for out, document in zip(passed, documents, strict=True))
    assert documents == before


def test_registers_where_the_capture_is_off() -> None:
    chat, calls = tiny_chat(capture=False), Calls()
    compressor = compressor_of(chat)
    compressing = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=WordRetriever()
    )
    for retriever in (WordRetriever() | compressor.transform_documents, compressing):
        lcel(chat, retriever).invoke(QUESTIONS[0], {"callbacks": [calls]})  # type: ignore[arg-type]
    assert [(r["contexts"], r["hits"]) for r in calls.reports] == [(3, 0), (3, 3)]


def test_documents_of_no_retriever_are_found_once_they_passed_through() -> None:
    chat = tiny_chat()
    found = list(DOCUMENTS[:2])  # as vectorstore.similarity_search would return them
    compressor_of(chat).transform_documents(found)
    answer = (ANSWER_PROMPT | chat).invoke({"context": format_docs(found), "input": "Hm?"})
    assert answer.response_metadata["ape"]["contexts"] == 2


def test_bound_models_are_taken_for_what_they_bind() -> None:
    chat = tiny_chat()
    assert compressor_of(chat.bind(stop=["x"]).with_config(tags=["a"])).model is chat
    assert compressor_of(chat.with_structured_output(Answer)).model is chat
    assert compressor_of(chat.with_structured_output(Answer, include_raw=True)).model is chat


def test_documents_are_registered_with_the_bound_model(tmp_path: Path) -> None:
    loaded_model().save_pretrained(tmp_path)
    loaded_tokenizer().save_pretrained(tmp_path)
    bound = tiny_chat(capture=False).bind(model=str(tmp_path))
    compressor_of(bound).transform_documents(DOCUMENTS[:2])
    answer = (ANSWER_PROMPT | bound).invoke({"context": format_docs(DOCUMENTS[:2]), "input": "?"})
    assert answer.response_metadata["ape"]["contexts"] == 2


def test_other_models_are_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="must be a ChatAPE or an APELanguageModel"):
        compressor_of("gpt")


# Ahead of time -----------------------------------------------------------------------------------

HISTORY_PROMPT = ChatPromptTemplate(
    [
        ("system", "Answer briefly from these documents.\n\n{context}"),
        MessagesPlaceholder("chat_history"),
        ("human", "{input}"),
    ]
)


@pytest.mark.parametrize(
    ("prompt", "pipeline"),
    [
        (ANSWER_PROMPT, lcel),
        (ANSWER_PROMPT, stuff),
        (QUESTION_FIRST_PROMPT, question_first),
        (HISTORY_PROMPT, retrieval_with_history),
    ],
)
@pytest.mark.parametrize("new_process", [False, True])
def test_first_question_after_warming_finds_everything(
    prompt: Any, pipeline: Any, new_process: bool
) -> None:
    store, calls = MemoryKVStore(), Calls()
    chat = tiny_chat(store=store)
    warmed = compressor_of(chat).warm(DOCUMENTS, prompt, show_progress=False)
    assert warmed == {"contexts": len(TEXTS), "hits": 0, "misses": len(TEXTS)}
    if new_process:
        chat = tiny_chat(store=store, scaling_factor=0.8)
    for question in QUESTIONS[:3]:
        pipeline(chat, WordRetriever()).invoke(question, {"callbacks": [calls]})
    assert calls.total("misses") == 0
    assert calls.total("hits") == 9


class Answer(BaseModel):
    """An answer."""

    text: str


def lookup(name: str) -> str:
    """Look a name up."""
    return name


INSTRUCTED_PROMPT = ChatPromptTemplate(
    [("system", "Read these.\n\n{context}\n\nThen answer briefly."), ("human", "{input}")]
)
BINDINGS: list[Callable[[ChatAPE], Any]] = [
    lambda chat: chat.bind_tools([lookup]),
    lambda chat: chat.bind(stop=["x"]).bind_tools([lookup]).with_config(tags=["a"]),
    lambda chat: chat.bind_tools([lookup], tool_choice="none"),
    lambda chat: chat.with_structured_output(Answer),
    lambda chat: chat.with_structured_output(Answer, include_raw=True),
    lambda chat: chat.with_structured_output(Answer, method="json_schema"),
]


@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize("bind", BINDINGS)
@pytest.mark.parametrize("prompt", [INSTRUCTED_PROMPT, QUESTION_FIRST_PROMPT])
def test_warming_heeds_what_is_bound_to_the_model(
    prompt: Any, bind: Callable[[ChatAPE], Any], tools: bool
) -> None:
    if bind in BINDINGS[:2] and not tools:
        pytest.skip("The template has no place for tools.")
    chat, calls = tiny_chat(tools=tools), Calls()
    bound = bind(chat)
    compressor_of(bound).warm(DOCUMENTS, prompt, show_progress=False)
    inputs = {"context": WordRetriever() | format_docs, "input": lambda question: question}
    with contextlib.suppress(OutputParserException):
        (inputs | prompt | bound).invoke(QUESTIONS[0], {"callbacks": [calls]})
    assert (calls.total("hits"), calls.total("misses")) == (3, 0)


def test_warming_heeds_the_bound_model(tmp_path: Path) -> None:
    loaded_model().save_pretrained(tmp_path)
    loaded_tokenizer(tools=True).save_pretrained(tmp_path)
    chat, calls = tiny_chat(), Calls()
    bound = chat.bind(model=str(tmp_path)).bind(tools=[lookup])
    compressor_of(bound).warm(DOCUMENTS, QUESTION_FIRST_PROMPT, show_progress=False)
    inputs = {"context": WordRetriever() | format_docs, "input": lambda question: question}
    (inputs | QUESTION_FIRST_PROMPT | bound).invoke(QUESTIONS[0], {"callbacks": [calls]})
    assert (calls.total("hits"), calls.total("misses")) == (3, 0)


def test_warming_again_encodes_nothing() -> None:
    compressor = compressor_of(tiny_chat())
    compressor.warm(DOCUMENTS, ANSWER_PROMPT, show_progress=False)
    again = compressor.warm(DOCUMENTS, ANSWER_PROMPT, show_progress=False)
    assert again == {"contexts": len(TEXTS), "hits": len(TEXTS), "misses": 0}


def test_warming_shows_progress_in_documents(capsys: pytest.CaptureFixture[str]) -> None:
    compressor_of(tiny_chat()).warm(DOCUMENTS, ANSWER_PROMPT)
    assert f"{len(DOCUMENTS)}/{len(DOCUMENTS)}" in capsys.readouterr().err


def test_many_documents_are_warmed_in_the_form_of_their_prompt() -> None:
    documents = [
        Document(f"Fact number {i} is that {i} is followed by {i + 1}.") for i in range(70)
    ]
    chat, calls = tiny_chat(), Calls()
    warmed = compressor_of(chat).warm(documents, ANSWER_PROMPT, show_progress=False)
    assert warmed["misses"] == 70
    lcel(chat, WordRetriever(documents=tuple(documents), k=5)).invoke(
        "Which number follows?", {"callbacks": [calls]}
    )
    assert (calls.total("hits"), calls.total("misses")) == (5, 0)


def test_document_prompt_is_part_of_what_is_warmed() -> None:
    form = PromptTemplate.from_template("Source: {source}\n{page_content}")
    chat, calls = tiny_chat(), Calls()
    compressor_of(chat).warm(DOCUMENTS, ANSWER_PROMPT, document_prompt=form, show_progress=False)

    def labelled(documents: list[Document]) -> str:
        return "\n\n".join(f"Source: {d.metadata['source']}\n{d.page_content}" for d in documents)

    inputs = {"context": WordRetriever() | labelled, "input": lambda q: q}
    (inputs | ANSWER_PROMPT | chat).invoke(QUESTIONS[0], {"callbacks": [calls]})
    assert (calls.total("hits"), calls.total("misses")) == (3, 0)


def test_string_is_the_prefix_itself() -> None:
    store = MemoryKVStore()
    model = APELanguageModel(
        model=loaded_model(), tokenizer=loaded_tokenizer(), store=store, max_tokens=3
    )
    compressor_of(model).warm(DOCUMENTS, "Read this:\n\n", show_progress=False)
    result = model.generate([f"Read this:\n\n{TEXTS[0]}\n\nSo?"])
    info = result.generations[0][0].generation_info or {}
    assert (info["ape"]["hits"], info["ape"]["misses"]) == (1, 0)


def test_completion_prompt_is_taken_too() -> None:
    model = APELanguageModel(
        model=loaded_model(), tokenizer=loaded_tokenizer(), store=MemoryKVStore(), max_tokens=3
    )
    prompt = PromptTemplate.from_template("Read this:\n\n{text}\n\n{question}")
    compressor_of(model).warm(DOCUMENTS, prompt, show_progress=False)
    value = prompt.invoke({"text": TEXTS[0], "question": "So?"})
    info = model.generate_prompt([value]).generations[0][0].generation_info or {}
    assert (info["ape"]["hits"], info["ape"]["misses"]) == (1, 0)


def test_prompt_without_a_place_for_documents_is_refused() -> None:
    compressor = compressor_of(tiny_chat())
    with pytest.raises((ConfigError, ValueError), match="document_variable"):
        compressor.warm(DOCUMENTS, ChatPromptTemplate([("human", "{question}")]))
    prompt = ChatPromptTemplate([("system", "{wisdom}"), ("human", "{question}")])
    warmed = compressor.warm(DOCUMENTS, prompt, document_variable="wisdom", show_progress=False)
    assert warmed["misses"] == len(TEXTS)


def test_what_cannot_be_warmed_is_refused_with_what_to_pass() -> None:
    chat: Any = tiny_chat()
    compressor: Any = compressor_of(chat)
    with pytest.raises(ConfigError, match=r"pass Document\(page_content="):
        compressor.warm(list(TEXTS), ANSWER_PROMPT)
    with pytest.raises(ConfigError, match="pass the prompt alone"):
        compressor.warm(DOCUMENTS, ANSWER_PROMPT | chat)
    for given in (None, "context"):
        prompt = ChatPromptTemplate([("human", "{question}"), MessagesPlaceholder("context")])
        with pytest.raises(ConfigError, match="pass a prompt that has them in a message"):
            compressor.warm(DOCUMENTS, prompt, document_variable=given)


def test_nothing_to_warm_is_no_error() -> None:
    empty = {"contexts": 0, "hits": 0, "misses": 0}
    assert compressor_of(ChatAPE()).warm([], ANSWER_PROMPT, show_progress=False) == empty
