"""Ask a LlamaIndex pipeline the same questions twice, and see what the second time costs.

Reads the text files of a folder, retrieves with BM25 (no network, no embedding model) and asks an
ordinary ``RetrieverQueryEngine`` and a ``ContextChatEngine``. The only thing that is not ordinary
LlamaIndex is the LLM: ``APELLM``.

    python examples/quickstart_llamaindex.py
    python examples/quickstart_llamaindex.py --model Qwen/Qwen2.5-0.5B-Instruct --data my_texts/
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from typing import Any

from _shared import Question, compare, console, parse_arguments, read_questions, read_texts, show
from llama_index.core import Document
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.retrievers.bm25 import BM25Retriever
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler
from rich.rule import Rule
from transformers.utils.logging import disable_progress_bar

from ape_integrations import APELLM


def main() -> None:
    """Build the pipeline, ask, ask again, compare."""
    arguments = parse_arguments(str(__doc__).partition("\n")[0])
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    disable_progress_bar()
    documents = [Document(text=text, id_=name) for name, text in read_texts(arguments.data).items()]
    questions = read_questions(arguments)
    talks = [question for question in questions if question.history]
    single = [question for question in questions if not question.history]
    with tempfile.TemporaryDirectory() as fresh:
        # The LLM is the only line that differs from any other LlamaIndex program.
        llm = APELLM(
            model_name=arguments.model,
            cache_dir=fresh if arguments.fresh else arguments.cache_dir,
            max_new_tokens=arguments.max_new_tokens,
            generate_kwargs={"do_sample": False},
        )
        splitter = SentenceSplitter(chunk_size=arguments.chunk_size, chunk_overlap=0)
        nodes = splitter.get_nodes_from_documents(documents)
        retriever = BM25Retriever.from_defaults(
            nodes=nodes, similarity_top_k=min(arguments.top_k, len(nodes))
        )
        query_engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
        chat_engine = ContextChatEngine.from_defaults(retriever, llm=llm)

        introduce(llm, f"{len(documents)} documents, {len(nodes)} nodes")
        asker = Asker(llm)
        console.print(Rule("RetrieverQueryEngine", align="left"))
        asker.ask_twice(lambda question: query_engine.query(question.text), single)
        if talks:
            console.print(Rule("ContextChatEngine", align="left"))
            asker.ask_twice(lambda question: chat(chat_engine, question), talks)
        compare(llm.generator, [*single, *talks], arguments.max_new_tokens)
        llm.generator.close()


class Asker:
    """Asks questions twice and notes what the LLM reported.

    Parameters
    ----------
    llm : APELLM
        Renders the prompts that it was asked.
    """

    def __init__(self, llm: APELLM) -> None:
        self.llm = llm
        self.watcher = Watcher()
        get_dispatcher().add_event_handler(self.watcher)

    def ask_twice(self, ask: Callable[[Question], Any], questions: list[Question]) -> None:
        """Ask all questions, then all of them again; print the first answers."""
        for again in (False, True):
            for question in questions:
                response = ask(question)
                call = self.watcher.last
                question.answers.append(str(response).strip())
                question.reports.append(call.response.raw["ape"])
                if not again:
                    chat_call = hasattr(call, "messages")
                    question.prompt = (
                        self.llm.render_messages(call.messages) if chat_call else call.prompt
                    )
                    show(question, [node.node.ref_doc_id or "?" for node in response.source_nodes])


class Watcher(BaseEventHandler):
    """Keeps the last LLM call that LlamaIndex's instrumentation reported."""

    last: Any = None

    def handle(self, event: Any, **kwargs: Any) -> None:
        """Keep the event if an LLM call ended."""
        if type(event).__name__ in ("LLMChatEndEvent", "LLMCompletionEndEvent"):
            self.last = event


def chat(engine: ContextChatEngine, question: Question) -> Any:
    """Ask in a conversation that went as the question's history says."""
    history = [
        message
        for turn in question.history
        for message in (
            ChatMessage(role="user", content=turn["question"]),
            ChatMessage(role="assistant", content=turn["answer"]),
        )
    ]
    return engine.chat(question.text, chat_history=history)


def introduce(llm: APELLM, documents: str) -> None:
    """Load the model and say what is about to happen."""
    started = time.perf_counter()
    with console.status("Loading the model ..."):
        generator = llm.generator
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in generator.model.parameters()) / 1e6
    entries = generator.store.stats().entries
    console.print(Rule("LlamaIndex with APELLM"))
    console.print(
        f"Model [bold]{llm.metadata.model_name}[/bold], {parameters:.0f}M parameters, loaded in "
        f"{seconds:.1f} s.  {documents}."
    )
    state = f"{entries} entries of earlier runs" if entries else "empty, nothing was read before"
    console.print(f"Store: {state}.")
    console.print()


if __name__ == "__main__":
    main()
