"""Chat over a folder of files with LangChain, and see what the cache does for each answer.

The same page as that of chatbot_llamaindex.py, over a chain written with pipes.

    pip install '.[chat]'
    python examples/chatbot_langchain.py
    python examples/chatbot_langchain.py my_files/ --model Qwen/Qwen2.5-0.5B-Instruct
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_text_splitters import RecursiveCharacterTextSplitter

from ape_integrations import ChatAPE
from ape_integrations.chatbot.arguments import parse_arguments
from ape_integrations.chatbot.langchain import LangChainPipeline
from ape_integrations.chatbot.serve import serve

with warnings.catch_warnings():
    # The package announces its end; it still has the loaders and a BM25 without a service.
    warnings.simplefilter("ignore", DeprecationWarning)
    from langchain_community.document_loaders import BSHTMLLoader, PyPDFLoader, TextLoader
    from langchain_community.retrievers import BM25Retriever

PROMPT = ChatPromptTemplate(
    [
        ("system", "Context information is below.\n\n{context}\n\nAnswer from the context."),
        ("placeholder", "{history}"),
        ("human", "{question}"),
    ]
)


def main() -> None:
    """Build the pipeline, serve the page."""
    arguments = parse_arguments(__doc__, Path(__file__).parent / "data")
    # The chat model is the only line that differs from any other LangChain program.
    chat = ChatAPE(
        model=arguments.model,
        cache_dir=arguments.cache_dir,
        temperature=0,
        max_tokens=arguments.max_new_tokens,
    )
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=arguments.chunk_size, chunk_overlap=0, length_function=chat.get_num_tokens
    )

    def read(path: Path) -> Sequence[Document]:
        return splitter.split_documents(load(path))

    def chain(documents: list[Document]) -> Runnable[dict[str, Any], dict[str, Any]]:
        retriever = BM25Retriever.from_documents(
            documents, k=arguments.top_k, preprocess_func=words
        )
        filled = RunnablePassthrough.assign(context=lambda x: join(x["context"])) | PROMPT
        return (
            RunnablePassthrough.assign(context=itemgetter("question") | retriever)
            .assign(context=lambda x: unique([*x["context"], *x["carried"]]))
            .assign(prompt=filled)
            .assign(answer=itemgetter("prompt") | chat)
        )

    serve(LangChainPipeline(chat, PROMPT, read, chain), arguments)


def load(path: Path) -> list[Document]:
    """Read a file with the loader for its kind."""
    if path.suffix.lower() == ".pdf":
        return PyPDFLoader(str(path)).load()
    if path.suffix.lower() in (".html", ".htm"):
        return BSHTMLLoader(path, "utf-8", {"features": "html.parser"}, " ").load()
    return TextLoader(path, "utf-8").load()


def words(text: str) -> list[str]:
    """Cut a text into the words that BM25 compares."""
    return re.findall(r"\w+", text.lower())


def unique(documents: list[Document]) -> list[Document]:
    """Leave out documents that stand there already."""
    return list({document.page_content: document for document in documents}.values())


def join(documents: list[Document]) -> str:
    """Join documents as every tutorial does."""
    return "\n\n".join(document.page_content for document in documents)


if __name__ == "__main__":
    main()
