"""Errors of the package. Each message says what is wrong, why, and what to do."""

from __future__ import annotations


class APEError(Exception):
    """Base class of every error that the package raises on purpose.

    None of them is a ``ValueError``: LlamaIndex's synthesizers take that for an answer that cannot
    be parsed, and answer "Empty Response" instead.
    """


class ConfigError(APEError):
    """A setting or an argument is out of range or contradicts another."""


class UnsupportedModelError(APEError):
    """The model cannot be served with APE; the message names the reason and an alternative."""


class ContextWindowError(APEError):
    """Prefix, contexts, query and new tokens do not fit the model's position limit."""


class StoreError(APEError, OSError):
    """A store cannot be opened at all, for example because its directory is not writable."""


class MissingDependencyError(APEError, ImportError):
    """An optional dependency is missing; the message names the extra that brings it."""
