"""Exact match of a model on the held-out part of the synthetic world.

Every case is a prompt in three parts, prefix, contexts and query, and one expected answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ape_integrations.errors import ConfigError
from ape_integrations.evaluation import prompts, world

__all__ = [
    "DEFAULT_GRID",
    "Case",
    "Generate",
    "Score",
    "demo_rows",
    "draw_cases",
    "evaluate",
    "select_grid",
    "sequential_generator",
]

Generate = Callable[[str, Sequence[str], str], str]

# Kind of question, numbers of documents (examples for few-shot).
DEFAULT_GRID: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("single", (1, 8, 16, 32, 64)),
    ("unanswerable", (8, 32)),
    ("two-hop", (2, 8, 16, 32)),
    ("follow-up", (4, 8)),
    ("few-shot", (4, 8, 16)),
)


@dataclass(frozen=True)
class Case:
    """One prompt with its expected answer.

    Parameters
    ----------
    kind : str
        Kind of question.
    style : str
        Which pipeline's prompt it is.
    prompt : world.Prompt
        Prefix, contexts and query.
    answer : str
        The expected text, to be matched exactly.
    """

    kind: str
    style: str
    prompt: world.Prompt
    answer: str


@dataclass(frozen=True)
class Score:
    """Exact match over the cases of one kind and number of documents."""

    kind: str
    documents: int
    correct: int
    cases: int

    @property
    def accuracy(self) -> float:
        """Share of cases answered exactly."""
        return self.correct / self.cases


def draw_cases(
    tokenizer: Any,
    kind: str,
    documents: int,
    count: int,
    *,
    seed: int = 7,
    styles: Sequence[str] | None = None,
) -> list[Case]:
    """Draw held-out cases of one kind.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Renders the chat prompts.
    kind : str
        ``single``, ``unanswerable``, ``two-hop``, ``follow-up`` or ``few-shot``.
    documents : int
        Number of documents, or of labelled examples.
    count : int
        Number of cases.
    seed : int
        The same seed gives the same cases.
    styles : sequence of str, optional
        Prompt styles to go round; by default all that suit the kind.

    Returns
    -------
    list of Case
        Cases in a fixed order.
    """
    drawn = world.World(world.stable_hash(f"{seed}/{kind}/{documents}"), "held_out")
    render = world.chat_renderer(tokenizer)
    if styles is None:
        styles = {"follow-up": world.CHAT_STYLES, "few-shot": ("few_shot",)}.get(kind, world.STYLES)
    cases = []
    for index in range(count):
        style = styles[index % len(styles)]
        if kind == "few-shot":
            task = drawn.few_shot(documents)
        else:
            kinds = ["single", kind] if kind == "follow-up" else [kind]
            task = drawn.task(documents, kinds)
        prompt = world.build_prompt(
            style, task.documents, task.turns, render, drawn.rng, bos=tokenizer.bos_token or ""
        )
        cases.append(Case(kind, style, prompt, task.turns[-1].answer))
    return cases


def demo_rows(
    tokenizer: Any, grid: Iterable[tuple[str, Sequence[int]]], samples: int, seed: int = 7
) -> list[list[prompts.Case]]:
    """Draw the cases of every kind and number of documents, one list each.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Renders the chat prompts.
    grid : iterable of (str, sequence of int)
        Kinds, each with its numbers of documents.
    samples : int
        Cases per list.
    seed : int
        The same seed gives the same cases; fewer samples give the first of them.
    """
    return [
        [
            prompts.Case(
                kind,
                documents,
                case.prompt.prefix,
                case.prompt.contexts,
                case.prompt.query,
                (case.answer,),
            )
            for case in draw_cases(tokenizer, kind, documents, samples, seed=seed)
        ]
        for kind, counts in grid
        for documents in counts
    ]


def select_grid(
    kinds: Sequence[str] = (),
    documents: Sequence[int] = (),
    grid: Sequence[tuple[str, Sequence[int]]] = DEFAULT_GRID,
) -> list[tuple[str, tuple[int, ...]]]:
    """Choose rows of a grid.

    Parameters
    ----------
    kinds : sequence of str
        Only these kinds of question; all if empty.
    documents : sequence of int
        Only rows with these numbers of documents; all if empty.
    grid : sequence of (str, sequence of int)
        Kinds, each with its numbers of documents.

    Raises
    ------
    ConfigError
        No such kind of question, or no row is left.
    """
    known = [kind for kind, _ in DEFAULT_GRID]
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise ConfigError(f"Unknown kind {unknown[0]!r}. Choose from: {', '.join(known)}.")
    cells = [
        (kind, tuple(count for count in counts if not documents or count in documents))
        for kind, counts in grid
        if not kinds or kind in kinds
    ]
    chosen = [(kind, counts) for kind, counts in cells if counts]
    if not chosen:
        raise ConfigError(
            f"No row has {' or '.join(map(str, documents))} contexts: {cells_of(grid)}."
        )
    return chosen


def cells_of(grid: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Name the rows of a grid."""
    return "; ".join(f"{kind}: {', '.join(map(str, counts))}" for kind, counts in grid)


def evaluate(
    generate: Generate,
    tokenizer: Any,
    *,
    grid: Iterable[tuple[str, Sequence[int]]] = DEFAULT_GRID,
    samples: int = 50,
    seed: int = 7,
    styles: Sequence[str] | None = None,
    on_case: Callable[[Case, str], None] | None = None,
) -> list[Score]:
    """Score a generator on the grid of kinds and numbers of documents.

    Parameters
    ----------
    generate : callable
        ``(prefix, contexts, query) -> text``, greedy.
    tokenizer : PreTrainedTokenizerBase
        Renders the chat prompts.
    grid : iterable of (str, sequence of int)
        Kinds, each with its numbers of documents.
    samples : int
        Cases per cell.
    seed : int
        Seed of the cases.
    styles : sequence of str, optional
        See :func:`draw_cases`.
    on_case : callable, optional
        Called with every case and the text it got.

    Returns
    -------
    list of Score
        One per cell, in the order of the grid.
    """
    scores = []
    for kind, counts in grid:
        for documents in counts:
            cases = draw_cases(tokenizer, kind, documents, samples, seed=seed, styles=styles)
            correct = 0
            for case in cases:
                prompt = case.prompt
                text = generate(prompt.prefix, prompt.contexts, prompt.query)
                correct += text.strip() == case.answer
                if on_case is not None:
                    on_case(case, text)
            scores.append(Score(kind, documents, correct, len(cases)))
    return scores


def sequential_generator(model: Any, tokenizer: Any, *, max_new_tokens: int = 48) -> Generate:
    """Return a generator that sends the whole prompt through ``model.generate``, greedily.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer; the prompts carry their special tokens already.
    max_new_tokens : int
        Upper limit of an answer, in tokens.
    """
    import torch

    def generate(prefix: str, contexts: Sequence[str], query: str) -> str:
        text = prefix + world.SEPARATOR.join(contexts) + query
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    return generate
