"""Prompt parts to token ids that fit the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ape_integrations.core.cache import ContextLayout
from ape_integrations.core.config import APEConfig
from ape_integrations.core.tokens import Tokens
from ape_integrations.errors import ConfigError, ContextWindowError


@dataclass(frozen=True)
class PreparedPrompt:
    """Token ids of one prompt, part by part.

    Parameters
    ----------
    prefix, query : list of int
        Token ids.
    contexts : list of list of int
        Token ids of each context; equal contexts stand once.
    sequential : bool
        Contexts stand one after the other, and do not share positions.
    dropped : int
        Contexts that were left out because others matter more to the query.
    separator : tuple of int
        What contexts end with, so that they read as in a prompt whatever their rank. It is not
        read behind the last one of a sequence, nor behind a single one, which the query follows
        as in the prompt.
    """

    prefix: list[int]
    contexts: list[list[int]]
    query: list[int]
    sequential: bool = False
    dropped: int = 0
    separator: tuple[int, ...] = ()

    @property
    def layout(self) -> ContextLayout:
        """Where the contexts stand."""
        lengths = tuple(map(len, self._as_read()))
        return ContextLayout(len(self.prefix), lengths, self.sequential)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens in all."""
        return len(self.prefix) + self.layout.total + len(self.query)

    def flat(self) -> PreparedPrompt:
        """Return the same tokens in their order as one ordinary prompt."""
        contexts = [token for ids in self._in_sequence() for token in ids]
        return PreparedPrompt([], [], [*self.prefix, *contexts, *self.query])

    def _as_read(self) -> list[list[int]]:
        """Return the contexts without the tokens that the query does not see."""
        in_sequence = self.sequential or len(self.contexts) == 1
        return self._in_sequence() if in_sequence else self.contexts

    def _in_sequence(self) -> list[list[int]]:
        """Return the contexts without the separator behind the last one."""
        if not self.contexts:
            return []
        *others, last = self.contexts
        cut = len(last) - len(self.separator)
        if not self.separator or cut <= 0 or tuple(last[cut:]) != self.separator:
            return self.contexts
        return [*others, last[:cut]]

    def logical_ids(self) -> list[int]:
        """Return ids of the prompt's logical length: the longest context stands for all."""
        if self.sequential:
            return self.flat().query
        # Of several that are equally long, the same one whatever their order.
        longest = max(self._as_read(), key=lambda ids: (len(ids), ids), default=[])
        return [*self.prefix, *longest, *self.query]


class PromptPreparer:
    """Tokenises the parts of a prompt, each alone, and fits them to the model's positions.

    Parameters
    ----------
    tokens : Tokens
        The model's tokenizer.
    config : APEConfig
        Default prefix and context separator.
    max_positions : int or None
        Positions that the model has.
    """

    def __init__(self, tokens: Tokens, config: APEConfig, max_positions: int | None) -> None:
        self._tokens = tokens
        self._config = config
        self._max_positions = max_positions

    def prepare(self, prefix: str, contexts: Sequence[str], query: str) -> PreparedPrompt:
        """Tokenise each part of a prompt.

        Raises
        ------
        ConfigError
            A context is empty, or the query, or without contexts the whole prompt.
        """
        if isinstance(contexts, str):
            raise ConfigError("contexts must be a sequence of strings, not one string.")
        if not contexts:
            ids = self._tokens.prompt(prefix + query)
            if not ids:
                raise ConfigError("The prompt is empty: there is nothing to generate from.")
            return PreparedPrompt([], [], ids)
        query_ids = self._tokens.rest(query)
        if not query_ids:
            raise ConfigError("The query is empty: something must stand behind the contexts.")
        return PreparedPrompt(
            self.prefix_ids(prefix),
            self.context_ids(contexts),
            query_ids,
            sequential=self._config.sequential,
            separator=tuple(self._tokens.literal(self._config.context_separator)),
        )

    def prefix_ids(self, prefix: str) -> list[int]:
        """Tokenise a shared prefix; an empty one becomes the default prefix."""
        if prefix:
            return self._tokens.prompt(prefix)
        return self._tokens.default_prefix(self._config.default_prefix)

    def context_ids(self, contexts: Sequence[str]) -> list[list[int]]:
        """Tokenise contexts, each with a trailing separator and special tokens as plain text.

        Raises
        ------
        ConfigError
            A context is empty.
        """
        for text in contexts:
            if not isinstance(text, str):
                raise ConfigError(
                    f"Contexts are strings, not {type(text).__name__}: pass a document's text."
                )
        if any(not text.strip() for text in contexts):
            raise ConfigError("A context is empty. Leave empty texts out.")
        separator = self._config.context_separator
        unique = {tuple(self._tokens.literal(text.strip() + separator)): None for text in contexts}
        return [list(ids) for ids in unique]

    def within_window(
        self,
        prefix_ids: Sequence[int],
        contexts: Sequence[list[int]],
        *,
        warn: bool = True,
    ) -> list[list[int]]:
        """Return the contexts that the model has positions for, each alone behind a prefix."""
        if self._max_positions is None:
            return list(contexts)
        room = self._max_positions - len(prefix_ids)
        fitting = [ids for ids in contexts if len(ids) <= room]
        if warn and len(fitting) < len(contexts):
            warnings.warn(
                f"{len(contexts) - len(fitting)} of {len(contexts)} texts are longer than the "
                f"{room} positions that the model has for them, and are left out. Smaller chunks "
                "give better answers.",
                stacklevel=4,
            )
        return fitting

    def fit(self, prompt: PreparedPrompt, new_tokens: int) -> PreparedPrompt:
        """Check the position limit, and split contexts that are too long for it.

        Raises
        ------
        ContextWindowError
            Prefix, query and new tokens leave no room, or contexts in sequence do not fit.
        """
        prompt = replace(prompt, sequential=self._config.sequential)
        limit = self._max_positions
        if limit is None:
            return prompt
        room = limit - len(prompt.prefix) - len(prompt.query) - new_tokens
        if room < (1 if prompt.contexts else 0):
            raise ContextWindowError(
                f"The prompt does not fit the model's {limit} positions: prefix "
                f"{len(prompt.prefix)} + query {len(prompt.query)} + new tokens {new_tokens}"
                f"{', and some room for contexts' if prompt.contexts else ''}. "
                f"{'' if prompt.contexts else 'No retrieved text was recognised in it. '}"
                "Shorten the query or the history, or lower max_new_tokens."
            )
        kept = self._config.max_contexts
        in_sequence = prompt.sequential and (kept is None or len(prompt.contexts) <= kept)
        if in_sequence and prompt.layout.total > room:
            raise ContextWindowError(
                f"{prompt.layout.total} context tokens in sequence do not fit the {room} positions "
                'left for them. Use context_positions="shared" with recompute_ratio=0, set '
                "max_contexts, or retrieve less."
            )
        if all(len(ids) <= room for ids in prompt.contexts):
            return prompt
        warnings.warn(
            f"A context is longer than the {room} positions left for it and is read as several "
            "contexts. Smaller chunks give better answers.",
            stacklevel=4,
        )
        pieces: dict[tuple[int, ...], None] = {}
        for ids in prompt.contexts:
            count = 1 if len(ids) <= room else math.ceil(len(ids) / _piece_size(limit, room))
            size = math.ceil(len(ids) / count)
            pieces |= {tuple(ids[i : i + size]): None for i in range(0, len(ids), size)}
        return replace(prompt, contexts=[list(ids) for ids in pieces])


def _piece_size(limit: int, room: int) -> int:
    """Return how long pieces of a context may be, which must be found again with other queries.

    A quarter of the model's positions or a multiple of it, so that a chat's growing history moves
    the cuts a few times and not with every turn. Where less is left, half of that, and so on.
    """
    step = max(1, limit // 4)
    while step > room:
        step //= 2
    return room - room % step
