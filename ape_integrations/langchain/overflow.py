"""Prompts that do not fit the model, as the error that LangChain's middleware looks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ape_integrations.errors import ContextWindowError

try:
    from langchain_core.exceptions import ContextOverflowError
except ImportError:  # older releases have no name for it

    class ContextOverflowError(Exception):  # type: ignore[no-redef]
        """Stands for the error of later releases."""


class PromptOverflowError(ContextWindowError, ContextOverflowError):
    """The prompt does not fit; LangChain's summarisation shortens the history and tries again."""


@contextmanager
def overflow_errors() -> Iterator[None]:
    """Raise a :class:`PromptOverflowError`, in LangChain's words, where a prompt does not fit."""
    try:
        yield
    except ContextWindowError as error:
        raise PromptOverflowError(str(error).replace("max_new_tokens", "max_tokens")) from error
