"""The pipelines of LangChain that put retrieved documents in front of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langchain.agents import create_agent
from langchain_classic.chains import (
    RetrievalQA,
    create_history_aware_retriever,
    create_retrieval_chain,
)
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever, MultiQueryRetriever
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.tools import create_retriever_tool

from ape_integrations import APEDocumentCompressor, ChatAPE
from tests.langchain.helpers import format_docs, searching_chat, tiny_chat

Pipeline = Runnable[str, Any]

ANSWER_PROMPT = ChatPromptTemplate(
    [("system", "Answer briefly from these documents.\n\n{context}"), ("human", "{input}")]
)
QUESTION_FIRST_PROMPT = ChatPromptTemplate(
    [
        (
            "human",
            "Help with a question about what was found in a library. Keep to three sentences.\n"
            "Question: {input} \nContext: {context} \nAnswer:",
        )
    ]
)
HISTORY = [HumanMessage("What is Aldor?"), AIMessage("A town by the sea.")]


def stuff(model: ChatAPE, retriever: BaseRetriever) -> Pipeline:
    answer = create_stuff_documents_chain(model, ANSWER_PROMPT)
    return {"context": retriever, "input": RunnablePassthrough()} | answer


def retrieval_with_history(model: ChatAPE, retriever: BaseRetriever) -> Pipeline:
    rephrase = ChatPromptTemplate(
        [
            ("system", "Rephrase the last question so that it stands alone."),
            MessagesPlaceholder("chat_history"),
            ("human", "{input}"),
        ]
    )
    answer = ChatPromptTemplate(
        [
            ("system", "Answer briefly from these documents.\n\n{context}"),
            MessagesPlaceholder("chat_history"),
            ("human", "{input}"),
        ]
    )
    chain = create_retrieval_chain(
        create_history_aware_retriever(model, retriever, rephrase),
        create_stuff_documents_chain(model, answer),
    )
    return RunnableLambda(lambda q: {"input": q, "chat_history": HISTORY}) | chain


def lcel(model: ChatAPE, retriever: BaseRetriever) -> Pipeline:
    inputs = {"context": retriever | format_docs, "input": RunnablePassthrough()}
    return inputs | ANSWER_PROMPT | model | StrOutputParser()


def question_first(model: ChatAPE, retriever: BaseRetriever) -> Pipeline:
    inputs = {"context": retriever | format_docs, "input": RunnablePassthrough()}
    return inputs | QUESTION_FIRST_PROMPT | model | StrOutputParser()


def retrieval_qa(chain_type: str) -> Callable[[ChatAPE, BaseRetriever], Pipeline]:
    def build(model: ChatAPE, retriever: BaseRetriever) -> Pipeline:
        chain = RetrievalQA.from_chain_type(model, chain_type=chain_type, retriever=retriever)
        return RunnableLambda(lambda question: {"query": question}) | chain

    return build


def compression(model: ChatAPE, retriever: BaseRetriever) -> Pipeline:
    compressing = ContextualCompressionRetriever(
        base_compressor=APEDocumentCompressor(model=model), base_retriever=retriever
    )
    return lcel(model, compressing)


def multi_query(model: ChatAPE, retriever: BaseRetriever) -> Pipeline:
    return lcel(model, MultiQueryRetriever.from_llm(retriever=retriever, llm=model))


def agent(model: ChatAPE, retriever: BaseRetriever) -> Pipeline:
    search = create_retriever_tool(retriever, "search", "Looks documents up.")
    graph = create_agent(model, [search], system_prompt="Look things up, then answer.")
    return RunnableLambda(lambda question: {"messages": [HumanMessage(question)]}) | graph


PIPELINES: dict[str, Callable[[ChatAPE, BaseRetriever], Pipeline]] = {
    "stuff": stuff,
    "retrieval_with_history": retrieval_with_history,
    "lcel": lcel,
    "question_first": question_first,
    "retrieval_qa_stuff": retrieval_qa("stuff"),
    "retrieval_qa_map_reduce": retrieval_qa("map_reduce"),
    "retrieval_qa_refine": retrieval_qa("refine"),
    "compression": compression,
    "multi_query": multi_query,
    "agent": agent,
}


def chat_for(name: str, **kwargs: Any) -> ChatAPE:
    """Return a model for a pipeline: one that calls tools for the agent."""
    return searching_chat(**kwargs) if name == "agent" else tiny_chat(**kwargs)
