"""Questions about the held-out part of the synthetic world, which score the bundled model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ape_integrations.errors import ConfigError
from ape_integrations.evaluation import world
from ape_integrations.evaluation.prompts import Case

# Kind of question, numbers of documents (examples for few-shot).
DEFAULT_GRID: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("single", (1, 8, 16, 32, 64)),
    ("unanswerable", (8, 32)),
    ("two-hop", (2, 8, 16, 32)),
    ("follow-up", (4, 8)),
    ("few-shot", (4, 8, 16)),
)


def draw_cases(
    tokenizer: Any,
    kind: str,
    documents: int,
    count: int,
    *,
    seed: int = 7,
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

    Returns
    -------
    list of Case
        Cases in a fixed order, going round the prompt styles that suit the kind.
    """
    drawn = world.World(world.stable_hash(f"{seed}/{kind}/{documents}"), "held_out")
    render = world.chat_renderer(tokenizer)
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
        parts = prompt.prefix, prompt.contexts, prompt.query
        cases.append(Case(kind, documents, *parts, (task.turns[-1].answer,)))
    return cases


def demo_rows(
    tokenizer: Any, grid: Iterable[tuple[str, Sequence[int]]], samples: int, seed: int = 7
) -> list[list[Case]]:
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
        draw_cases(tokenizer, kind, documents, samples, seed=seed)
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
