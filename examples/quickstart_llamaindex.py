"""Ask a LlamaIndex pipeline the same questions twice, and see what the second time costs.

Reads the text files of a folder, retrieves with BM25 (no network, no embedding model) and asks an
ordinary ``RetrieverQueryEngine`` and a ``ContextChatEngine``. The only thing that is not ordinary
LlamaIndex is the LLM: ``APELLM``.

    python examples/quickstart_llamaindex.py
    python examples/quickstart_llamaindex.py --model Qwen/Qwen2.5-0.5B-Instruct --data my_texts/
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _table import print_table
from llama_index.core import Document
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.retrievers.bm25 import BM25Retriever
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from ape_integrations import APELLM

HERE = Path(__file__).parent
console = Console(width=min(Console().width, 100), highlight=False)


def main() -> None:
    """Build the pipeline, ask, ask again, compare."""
    arguments = parse_arguments()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    disable_progress_bar()
    documents = read_documents(arguments.data)
    questions = read_questions(arguments)
    with tempfile.TemporaryDirectory() as fresh:
        cache_dir = fresh if arguments.fresh else arguments.cache_dir
        # The LLM is the only line that differs from any other LlamaIndex program.
        llm = APELLM(
            model_name=arguments.model,
            cache_dir=cache_dir,
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

        introduce(llm, documents, nodes)
        watcher = Watcher.install()
        talks = [question for question in questions if question.history]
        single = [question for question in questions if not question.history]
        console.print(Rule("RetrieverQueryEngine", align="left"))
        ask_twice(lambda question: query_engine.query(question.text), single, watcher)
        if talks:
            console.print(Rule("ContextChatEngine", align="left"))
            ask_twice(lambda question: chat(chat_engine, question), talks, watcher)
        compare(llm, [*single, *talks])


@dataclass
class Question:
    """A question, and what came of it."""

    text: str
    answer: str = ""
    history: list[dict[str, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    prompt: Any = None

    def is_right(self, answer: str) -> bool:
        """Whether an answer says what it should."""
        return self.answer.rstrip(".").lower() in answer.lower()


class Watcher(BaseEventHandler):
    """Keeps the last LLM call that LlamaIndex's instrumentation reported."""

    last: Any = None

    @classmethod
    def install(cls) -> Watcher:
        """Listen to every event."""
        watcher = cls()
        get_dispatcher().add_event_handler(watcher)
        return watcher

    def handle(self, event: Any, **kwargs: Any) -> None:
        """Keep the event if an LLM call ended."""
        if type(event).__name__ in ("LLMChatEndEvent", "LLMCompletionEndEvent"):
            self.last = event


def ask_twice(ask: Callable[[Question], Any], questions: list[Question], watcher: Watcher) -> None:
    """Ask all questions, then all of them again; print the first answers."""
    for again in (False, True):
        for question in questions:
            response = ask(question)
            call = watcher.last
            question.answers.append(str(response).strip())
            question.reports.append(call.response.raw["ape"])
            question.prompt = call.messages if hasattr(call, "messages") else call.prompt
            if not again:
                show(question, response.source_nodes)


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


def compare(llm: APELLM, questions: list[Question]) -> None:
    """Run the same prompts without APE, and print the table."""
    model, tokenizer = llm.generator.model, llm.generator.tokenizer
    seconds = []
    with console.status("The same prompts without APE ..."):
        for question in questions:
            prompt = question.prompt
            if not isinstance(prompt, str):
                prompt = llm.render_messages(prompt)
            elapsed, answer = sequential(model, tokenizer, prompt, llm.max_new_tokens)
            seconds.append(elapsed)
            question.answers.append(answer)
    console.print()
    rows = [(question.text, *question.reports) for question in questions]
    print_table(rows, seconds, console)
    again = [report["first_token_seconds"] for _, _, report in rows]
    ratio = median(s / a for s, a in zip(seconds, again, strict=True))
    same = sum(first == second for first, second, _ in (q.answers for q in questions))
    console.print(
        f"Asked again, the first token comes [bold]{ratio:.1f}x[/bold] sooner than without APE "
        f"(median); {same} of {len(questions)} answers are word for word those of the first time."
    )
    graded = [question for question in questions if question.answer]
    if graded:
        counts = [sum(q.is_right(q.answers[i]) for q in graded) for i in range(3)]
        console.print(
            f"Right answers of {len(graded)}: {counts[0]} asked first, {counts[1]} asked again, "
            f"{counts[2]} without APE."
        )
    console.print("Run it again: the store keeps what was read, so asking first is fast as well.")


def sequential(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> tuple[float, str]:
    """Generate as transformers does; return seconds to the first token, and the answer."""
    bos = tokenizer.bos_token
    add = not (bos and prompt.startswith(bos))
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=add).input_ids.to(model.device)
    clock = FirstToken()
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return clock.seconds, answer.strip()


class FirstToken(BaseStreamer):
    """Takes the time to the first token."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds = 0.0
        self.calls = 0

    def put(self, value: Any) -> None:
        """Take the prompt, then every token."""
        self.calls += 1
        if self.calls == 2:
            self.seconds = time.perf_counter() - self.start

    def end(self) -> None:
        """Do nothing more."""


# Input and output --------------------------------------------------------------------------------


def read_documents(folder: Path) -> list[Document]:
    """Return the text files of a folder."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise SystemExit(f"There are no .txt files in {folder}.")
    return [
        Document(text=file.read_text(encoding="utf-8").strip(), id_=file.name, metadata={})
        for file in files
    ]


def read_questions(arguments: argparse.Namespace) -> list[Question]:
    """Return the questions of the command line, or those of the folder."""
    if arguments.question:
        return [Question(text) for text in arguments.question]
    file = arguments.data / "questions.json"
    if not file.exists():
        raise SystemExit(f"Ask something with --question, or write {file}.")
    loaded = [
        Question(one["question"], one["answer"], one.get("history", []))
        for one in json.loads(file.read_text(encoding="utf-8"))
    ]
    talks = [question for question in loaded if question.history]
    single = [question for question in loaded if not question.history]
    wanted = arguments.questions
    # A few of every kind: they stand in groups, from easy to hard.
    picked = sorted({i * len(single) // wanted for i in range(min(wanted, len(single)))})
    return [*(single[i] for i in picked), *talks[: max(2, wanted // 4)]]


def introduce(llm: APELLM, documents: list[Document], nodes: list[Any]) -> None:
    """Say what is about to happen."""
    started = time.perf_counter()
    with console.status("Loading the model ..."):
        generator = llm.generator
    stats = generator.store.stats()
    parameters = sum(p.numel() for p in generator.model.parameters()) / 1e6
    console.print(Rule("LlamaIndex with APELLM"))
    console.print(
        f"Model [bold]{llm.metadata.model_name}[/bold], {parameters:.0f}M parameters, loaded in "
        f"{time.perf_counter() - started:.1f} s.  {len(documents)} documents, {len(nodes)} nodes."
    )
    state = f"{stats.entries} entries" if stats.entries else "empty: nothing was read before"
    console.print(f"Store: {state}.")
    console.print()


def show(question: Question, source_nodes: list[Any]) -> None:
    """Print a question, its answer and where it was read."""
    answer = escape(question.answers[0]) or "(no answer)"
    mark = ""
    if question.answer:
        right = question.is_right(question.answers[0])
        mark = " [green]right[/green]" if right else f" [red]expected: {question.answer}[/red]"
    files = list(dict.fromkeys(node.node.ref_doc_id or "?" for node in source_nodes))
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    for turn in question.history:
        console.print(f"[dim]{turn['question']}  {turn['answer']}[/dim]")
    console.print(f"[bold]{question.text}[/bold]")
    console.print(Padding(f"{answer}{mark}", (0, 0, 0, 2)))
    console.print(Padding(f"[dim]from {', '.join(files[:3])}{more}[/dim]", (0, 0, 1, 2)))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="Hub name or directory (default: the bundled model)")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder of .txt files")
    parser.add_argument("--cache-dir", type=Path, help="the store (default: the user's cache)")
    parser.add_argument("--fresh", action="store_true", help="start with an empty store")
    parser.add_argument("--question", action="append", help="ask this (may be repeated)")
    parser.add_argument("--questions", type=int, default=8, help="how many of questions.json")
    parser.add_argument("--top-k", type=int, default=6, help="nodes to retrieve")
    parser.add_argument("--chunk-size", type=int, default=512, help="tokens per node")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    return parser.parse_args()


if __name__ == "__main__":
    main()
