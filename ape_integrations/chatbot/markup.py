"""Texts of users, documents and models as HTML and Markdown in which nothing is executed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from ape_integrations.chatbot.conversation import Turn
from ape_integrations.chatbot.files import Passage
from ape_integrations.chatbot.library import Library

#: Sources that stand below an answer; the rest opens with a click.
_SOURCES = 4

#: Code in Markdown, which is shown as it stands: between fences (a last one may still be open while
#: an answer streams), or between backticks.
_CODE = re.compile(r"((?:^|\n)```.*?(?:\n```|\Z)|`[^`\n]+`)", re.DOTALL)


def as_markdown(text: str) -> str:
    """Return Markdown in which HTML is text, and images are not fetched from anywhere."""
    parts = _CODE.split(text)
    return "".join(
        part if index % 2 else escape(part, quote=False).replace("![", "!&#91;")
        for index, part in enumerate(parts)
    )


def as_text(text: str) -> str:
    """Return HTML that shows a text as it is; line breaks do not end the element it stands in."""
    return escape(text).replace("\r", "").replace("\n", "&#10;")


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return the messages of a conversation for Gradio's chatbot."""
    shown = []
    for turn in turns:
        shown.append({"role": "user", "content": as_markdown(turn.question)})
        shown.append({"role": "assistant", "content": _answer(turn)})
    return shown


def _answer(turn: Turn) -> str:
    parts = [as_markdown(turn.answer)]
    if turn.state == "failed":
        parts.append(_note(turn.error))
    elif turn.state == "stopped":
        parts.append(_note("Stopped."))
    elif not turn.answer:
        waiting = turn.state == "answering"
        parts.append(_note("Reading the passages ..." if waiting else "(no answer)"))
    if turn.passages:
        parts.append(sources(turn.passages))
    return "\n\n".join(part for part in parts if part)


def _note(text: str) -> str:
    return f'<p class="ape-note">{as_text(text)}</p>'


def sources(passages: Sequence[Passage]) -> str:
    """Return the passages of an answer, each of which opens when its name is clicked."""
    shown = "".join(map(_source, passages[:_SOURCES]))
    if rest := "".join(map(_source, passages[_SOURCES:])):
        more = f"{len(passages) - _SOURCES} more"
        shown += f'<details class="ape-more"><summary>{more}</summary>{rest}</details>'
    return f'<div class="ape-sources">{shown}</div>'


def _source(passage: Passage) -> str:
    return (
        f'<details class="ape-source"><summary>{as_text(passage.title)}</summary>'
        f'<div class="ape-passage">{as_text(passage.text)}</div></details>'
    )


def documents(library: Library) -> str:
    """Return the state of a library: progress, files, and what was left out."""
    status, files, problems = library.status, library.files, library.problems
    parts = []
    if status.phase != "ready":
        verb = "Reading" if status.phase == "reading" else "Warming the cache: passage"
        count = f"{verb} {min(status.done + 1, status.total)} of {status.total}"
        hint = "" if status.phase == "reading" else " You can ask already."
        parts.append(
            f'<div class="ape-progress" role="progressbar" aria-valuenow="{status.fraction:.2f}">'
            f'<i style="width:{100 * status.fraction:.1f}%"></i></div>'
            f'<p class="ape-dim">{count}.{hint} {as_text(status.detail)}</p>'
        )
    if files:
        names = "".join(f"<li>{as_text(name)}</li>" for name in files)
        passages = len(library.passages)
        parts.append(
            f'<details class="ape-files"><summary>{_count(len(files), "file")}, '
            f"{_count(passages, 'passage')}</summary><ul>{names}</ul></details>"
        )
    elif status.phase != "reading":
        parts.append(f'<p class="ape-problem">{as_text(library.why_empty())}</p>')
    if library.left_out:
        kinds = _count(library.left_out, "file")
        parts.append(f'<p class="ape-dim">{kinds} of other kinds left out.</p>')
    if problems and (files or status.phase == "reading"):
        parts += [f'<p class="ape-problem">{as_text(problem)}</p>' for problem in problems]
    return "".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
