"""Ask LangChain pipelines the same questions twice, and see what the second time costs.

Reads the text files of a folder, retrieves with BM25 (no network, no embedding model) and asks a
chain of its own (LCEL), a retrieval chain with history, and an agent with a retriever tool. The
only thing that is not ordinary LangChain is the chat model: ``ChatAPE``.

    pip install '.[langchain]' langchain langchain-community rank-bm25
    python examples/quickstart_langchain.py
    python examples/quickstart_langchain.py --model Qwen/Qwen2.5-0.5B-Instruct --data my_texts/
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _shared import (
    Question,
    compare,
    console,
    parse_arguments,
    read_questions,
    read_texts,
    show,
)
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from langchain_text_splitters import RecursiveCharacterTextSplitter
from rich.rule import Rule
from transformers.utils.logging import disable_progress_bar

from ape_integrations import ChatAPE
from ape_integrations.errors import ConfigError

with warnings.catch_warnings():
    # The package announces its end; its BM25 is still the one without a service or a vector.
    warnings.simplefilter("ignore", DeprecationWarning)
    from langchain_community.retrievers import BM25Retriever

ANSWER = "Answer the question from the context.\n\n{context}"
REPHRASE = "Rephrase the last question so that it can be understood without the conversation."
AGENT = "Search before you answer. Answer the question from what was found."

Ask = Callable[[Question, dict[str, Any]], str]


def main() -> None:
    """Build the pipelines, ask, ask again, compare."""
    arguments = parse_arguments(__doc__.partition("\n")[0])
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    disable_progress_bar()
    questions = read_questions(arguments)
    with tempfile.TemporaryDirectory() as fresh:
        # The chat model is the only line that differs from any other LangChain program.
        chat = ChatAPE(
            model=arguments.model,
            cache_dir=fresh if arguments.fresh else arguments.cache_dir,
            temperature=0,
            max_tokens=arguments.max_new_tokens,
        )
        documents = read_documents(arguments.data, chat, arguments.chunk_size)
        retriever = BM25Retriever.from_documents(
            documents, k=arguments.top_k, preprocess_func=words
        )

        introduce(chat, documents)
        single = [question for question in questions if not question.history]
        talks = [question for question in questions if question.history]
        for_agent = [Question(question.text, question.answer) for question in single[1:3]]
        for name, ask, asked in (
            ("LCEL chain", lcel_chain(chat, retriever), single),
            ("Retrieval chain with history", history_chain(chat, retriever), talks),
            ("Agent with a retriever tool", agent(chat, retriever), for_agent),
        ):
            if asked:
                console.print(Rule(name, align="left"))
                ask_twice(ask, asked, chat)
        compare(chat.generator, [*single, *talks, *for_agent], arguments.max_new_tokens)
        chat.generator.close()


# Pipelines: ordinary LangChain -------------------------------------------------------------------


def lcel_chain(chat: ChatAPE, retriever: BaseRetriever) -> Ask:
    """Return a chain that is written down with pipes."""
    prompt = ChatPromptTemplate([("system", ANSWER), ("human", "{input}")])
    inputs = {"context": retriever | format_docs, "input": RunnablePassthrough()}
    chain = inputs | prompt | chat | StrOutputParser()
    return lambda question, config: chain.invoke(question.text, config)


def format_docs(documents: list[Document]) -> str:
    """Join documents as every tutorial does."""
    return "\n\n".join(document.page_content for document in documents)


def history_chain(chat: ChatAPE, retriever: BaseRetriever) -> Ask:
    """Return a retrieval chain that rephrases a question by the conversation before it."""
    conversation = [MessagesPlaceholder("chat_history"), ("human", "{input}")]
    chain = create_retrieval_chain(
        create_history_aware_retriever(
            chat, retriever, ChatPromptTemplate([("system", REPHRASE), *conversation])
        ),
        create_stuff_documents_chain(chat, ChatPromptTemplate([("system", ANSWER), *conversation])),
    )

    def ask(question: Question, config: dict[str, Any]) -> str:
        history: list[BaseMessage] = []
        for turn in question.history:
            history += [HumanMessage(turn["question"]), AIMessage(turn["answer"])]
        asked = {"input": question.text, "chat_history": history}
        return str(chain.invoke(asked, config)["answer"])

    return ask


def words(text: str) -> list[str]:
    """Cut a text into words for BM25, capitals and punctuation aside."""
    return re.findall(r"\w+", text.lower())


def agent(chat: ChatAPE, retriever: BaseRetriever) -> Ask:
    """Return an agent that searches with a tool."""
    tool = create_retriever_tool(retriever, "search", "Searches the documents.")
    middleware = [] if can_call_tools(chat) else [search_first]
    graph = create_agent(chat, [tool], system_prompt=AGENT, middleware=middleware)

    def ask(question: Question, config: dict[str, Any]) -> str:
        state = graph.invoke({"messages": [HumanMessage(question.text)]}, config)
        return str(state["messages"][-1].text)

    return ask


def can_call_tools(chat: ChatAPE) -> bool:
    """Whether the model's chat template has a place for tools."""
    tool = {"type": "function", "function": {"name": "search", "parameters": {}}}
    try:
        chat.render([HumanMessage("?")], tools=[tool])
    except ConfigError:
        console.print(
            "\nThis model cannot call tools: the agent searches for the question itself first, and "
            "the model answers from what the tool found."
        )
        return False
    return True


@wrap_model_call
def search_first(request: Any, handler: Any) -> Any:
    """Search for the question; let the model answer from the result."""
    last = request.messages[-1]
    if isinstance(last, HumanMessage):
        call = {"name": "search", "args": {"query": last.text}, "id": "search001"}
        return AIMessage("", tool_calls=[call])
    return handler(request.override(tools=[]))


# Measuring ---------------------------------------------------------------------------------------


class Watcher(BaseCallbackHandler):
    """Keeps what was retrieved, and the last call of the chat model."""

    def __init__(self, chat: ChatAPE) -> None:
        self._chat = chat
        self.sources: list[str] = []
        self.prompt = ""
        self.report: dict[str, Any] = {}

    def on_retriever_end(self, documents: Any, **kwargs: Any) -> None:
        """Keep where the documents come from."""
        self.sources = [document.metadata["source"] for document in documents]

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        """Keep the prompt."""
        tools = kwargs.get("invocation_params", {}).get("tools")
        self.prompt = self._chat.render(messages[0], tools=tools)

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        """Keep what the cache did."""
        self.report = response.generations[0][0].message.response_metadata["ape"]


def ask_twice(ask: Ask, questions: list[Question], chat: ChatAPE) -> None:
    """Ask all questions, then all of them again; print the first answers."""
    for again in (False, True):
        for question in questions:
            watcher = Watcher(chat)
            question.answers.append(ask(question, {"callbacks": [watcher]}).strip())
            question.reports.append(watcher.report)
            question.prompt = watcher.prompt
            if not again:
                show(question, watcher.sources)


def read_documents(folder: Path, chat: ChatAPE, chunk_size: int) -> list[Document]:
    """Return the text files of a folder, cut into pieces of so many tokens."""
    documents = [
        Document(text, metadata={"source": name}) for name, text in read_texts(folder).items()
    ]
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=chunk_size, chunk_overlap=0, length_function=chat.get_num_tokens
    )
    return splitter.split_documents(documents)


def introduce(chat: ChatAPE, documents: list[Document]) -> None:
    """Say what is about to happen."""
    generator = chat.generator
    stats = generator.store.stats()
    parameters = sum(p.numel() for p in generator.model.parameters()) / 1e6
    console.print(Rule("LangChain with ChatAPE"))
    console.print(
        f"Model [bold]{chat.name_of_model}[/bold], {parameters:.0f}M parameters, "
        f"{len(documents)} documents."
    )
    state = f"{stats.entries} entries" if stats.entries else "empty: nothing was read before"
    console.print(f"Store: {state}.\n")


if __name__ == "__main__":
    main()
