"""Documents and questions wherever a pipeline carries them: in a state, an artifact, a list."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from numbers import Real
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage
from pydantic import BaseModel

_DEPTH = 5  # of containers in containers; a state holds messages, one of them an artifact
_LOOKED_AT = 2000  # items of one container
_LONGEST_QUESTION = 1000  # characters
_QUESTIONS = ("question", "query", "input", "user_input", "user_query", "messages")


def documents_within(value: Any, depth: int = _DEPTH) -> Iterator[Document]:
    """Yield the documents in a value: alone, in containers, and in what tools hand over.

    Parameters
    ----------
    value : object
        Input or output of a step: a document, a list, a state with fields, a tool's message.
    depth : int
        How many containers deep to look.
    """
    if isinstance(value, Document):
        yield value
        return
    if depth:
        for item in islice(_items(value), _LOOKED_AT):
            yield from documents_within(item, depth - 1)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, ToolMessage):
        # Retrieval tools of the kind ``content_and_artifact`` put documents there.
        return iter((value.artifact,))
    if isinstance(value, (str, bytes, BaseMessage)):
        return iter(())
    if isinstance(value, Mapping):
        return iter(list(value.values()))
    if isinstance(value, (list, tuple)):
        return iter(value)
    if isinstance(value, BaseModel) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return iter(list(vars(value).values()) if hasattr(value, "__dict__") else ())
    return iter(())


def question_in(value: Any) -> str | None:
    """Return what is asked in the input of a chain or the state of a graph, if it shows.

    Parameters
    ----------
    value : object
        A string, a conversation, or a mapping or object with one of these in a usual field.
    """
    if isinstance(value, str):
        return value if 0 < len(value.strip()) <= _LONGEST_QUESTION else None
    if isinstance(value, (list, tuple)):
        asked = (m for m in reversed(value) if isinstance(m, HumanMessage))
        last = next(asked, None)
        return None if last is None else question_in(str(last.text))
    fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    found = (question_in(fields[name]) for name in _QUESTIONS if name in fields)
    return next((question for question in found if question), None)


def relevance_scores(documents: Sequence[Document]) -> dict[str, float]:
    """Return the scores that rerankers leave in the metadata of documents, by text."""
    found = ((d.page_content, d.metadata.get("relevance_score")) for d in documents)
    return {text: float(score) for text, score in found if isinstance(score, Real)}
