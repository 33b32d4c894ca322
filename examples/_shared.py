"""What both quickstarts do alike: questions, the same prompts without APE, the summary."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _table import print_table
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ape_integrations import APEGenerator
from ape_integrations.chatbot.arguments import positive

HERE = Path(__file__).parent
console = Console(width=min(Console().width, 100), highlight=False)


@dataclass
class Question:
    """A question, and what came of it.

    Parameters
    ----------
    text : str
        The question.
    answer : str
        What a right answer says, where that is known.
    history : list of dict
        Earlier turns, each with ``question`` and ``answer``.
    answers : list of str
        Answers: asked first, asked again, without APE.
    reports : list of dict
        What the cache did: asked first, asked again.
    prompt : str
        The rendered prompt that was answered.
    """

    text: str
    answer: str = ""
    history: list[dict[str, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    prompt: str = ""

    def is_right(self, answer: str) -> bool:
        """Whether an answer says what it should."""
        return self.answer.rstrip(".").lower() in answer.lower()


def read_texts(folder: Path) -> dict[str, str]:
    """Return the text files of a folder by name."""
    texts = {
        file.name: file.read_text(encoding="utf-8").strip() for file in sorted(folder.glob("*.txt"))
    }
    if not texts:
        raise SystemExit(f"There are no .txt files in {folder}.")
    return texts


def read_questions(arguments: argparse.Namespace) -> list[Question]:
    """Return the questions of the command line, or those of the folder.

    By default these are the ones marked ``quickstart``, which the bundled model answers.
    """
    if arguments.question:
        return [Question(text) for text in arguments.question]
    file = arguments.data / "questions.json"
    if not file.exists():
        raise SystemExit(f"Ask something with --question, or write {file}.")
    loaded = json.loads(file.read_text(encoding="utf-8"))
    marked = [one for one in loaded if arguments.all_questions or one.get("quickstart")]
    return [
        Question(one["question"], one["answer"], one.get("history", [])) for one in marked or loaded
    ]


def show(question: Question, sources: Sequence[str]) -> None:
    """Print a question, its first answer and where it was read."""
    answer = escape(question.answers[0]) or "(no answer)"
    mark = ""
    if question.answer:
        right = question.is_right(question.answers[0])
        mark = " [green]right[/green]" if right else f" [red]expected: {question.answer}[/red]"
    files = list(dict.fromkeys(sources))
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    for turn in question.history:
        console.print(f"[dim]{turn['question']}  {turn['answer']}[/dim]")
    console.print(f"[bold]{escape(question.text)}[/bold]")
    console.print(Padding(f"{answer}{mark}", (0, 0, 0, 2)))
    console.print(Padding(f"[dim]from {', '.join(files[:3])}{more}[/dim]", (0, 0, 1, 2)))


def compare(generator: APEGenerator, questions: list[Question], max_new_tokens: int) -> None:
    """Run the same prompts without APE, and print the table."""
    seconds = []
    with console.status("The same prompts without APE ..."):
        for question in questions:
            elapsed, answer = sequential(
                generator.model, generator.tokenizer, question.prompt, max_new_tokens
            )
            seconds.append(elapsed)
            question.answers.append(answer)
    console.print()
    print_table([(q.text, *q.reports) for q in questions], seconds, console)
    again = [question.reports[1]["first_token_seconds"] for question in questions]
    ratio = median(s / a for s, a in zip(seconds, again, strict=True))
    same = sum(question.answers[0] == question.answers[1] for question in questions)
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


def parse_arguments(description: str) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="Hub name or directory (default: the bundled model)")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder of .txt files")
    parser.add_argument("--cache-dir", type=Path, help="the store (default: the user's cache)")
    parser.add_argument("--fresh", action="store_true", help="start with an empty store")
    parser.add_argument("--question", action="append", help="ask this (may be repeated)")
    parser.add_argument("--all-questions", action="store_true", help="ask all of questions.json")
    parser.add_argument("--top-k", type=positive, default=4, help="documents to retrieve")
    parser.add_argument("--chunk-size", type=positive, default=512, help="tokens per document")
    parser.add_argument("--max-new-tokens", type=positive, default=32)
    return parser.parse_args()
