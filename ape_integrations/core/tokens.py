"""Text to token ids and back, without forged or doubled special tokens."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedTokenizerBase

from ape_integrations.core.guard import GUARD, unguarded


class Tokens:
    """Tokenises the parts of a prompt, each by its own rule.

    Rendered prompt text (prefix, query) may contain special tokens, which the chat template put
    there. Retrieved text must not: in a context, ``<|im_start|>`` is a string like any other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # A copy of its own: the setting is shared state of a fast tokenizer.
        self._literal = copy.deepcopy(tokenizer)
        self._literal.split_special_tokens = True

    def prompt(self, text: str) -> list[int]:
        """Tokenise the start of a prompt; special tokens are added unless the text has them."""
        bos = self.tokenizer.bos_token
        add = not (bos and text.startswith(bos))
        first, *others = text.split(GUARD)
        ids = self._ids(self.tokenizer, first, add_special_tokens=add)
        return ids + [token for piece in others for token in self.rest(piece)]

    def rest(self, text: str) -> list[int]:
        """Tokenise prompt text that follows something; nothing is added."""
        return [
            token
            for piece in text.split(GUARD)
            for token in self._ids(self.tokenizer, piece, add_special_tokens=False)
        ]

    def literal(self, text: str) -> list[int]:
        """Tokenise retrieved text; special tokens in it become ordinary characters."""
        return self._ids(
            self._literal,
            unguarded(text),
            add_special_tokens=False,
            split_special_tokens=True,
        )

    def default_prefix(self, text: str) -> list[int]:
        """Return the ids of a prefix for prompts that start with a context."""
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self.rest(text)

    @staticmethod
    def _ids(tokenizer: Any, text: str, **kwargs: Any) -> list[int]:
        ids: list[int] = tokenizer(text, return_attention_mask=False, verbose=False, **kwargs)[
            "input_ids"
        ]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of generated ids, without special tokens."""
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


class IncrementalDecoder:
    """Turns token ids into text piece by piece; pieces joined are the decoded whole.

    A piece is held back while it ends in an incomplete character.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._ids: list[int] = []
        self._window = 0
        self._read = 0

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """Return the text that ``ids`` add."""
        self._ids.extend(ids)
        known = self._tokens.decode(self._ids[self._window : self._read])
        text = self._tokens.decode(self._ids[self._window :])
        if (text.endswith("\ufffd") and not last) or len(text) <= len(known):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return text[len(known) :]
