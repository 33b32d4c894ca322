"""Text to token ids and back, without forged or doubled special tokens."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from ape_integrations.core.guard import GUARD, guarded, unguarded

#: Texts that may stand before another one without changing how it begins.
_BEFORE = ("\n", ":", "a")

#: Retrieved texts whose ids are kept, and the characters of the longest of them.
_KNOWN_TEXTS, _KNOWN_LENGTH = 2048, 16384


class Tokens:
    """Tokenises the parts of a prompt, each by its own rule.

    Rendered prompt text (prefix, query) may contain special tokens, which the chat template put
    there. Retrieved text must not: in a context, ``<|im_start|>`` is a string like any other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._copy()
        self._joining: dict[int, bool] = {}
        self._followers = [ids[-1] for word in ("a", " a") if (ids := self._plain_ids(word))]
        self._changes_starts = any(
            _behind(self._plain_ids, word) != self._plain_ids(word) for word in ("word", "1")
        )

    def _copy(self) -> None:
        # A copy of its own: the setting is shared state of a fast tokenizer.
        literal = copy.deepcopy(self.tokenizer)
        literal.split_special_tokens = True
        self._special_ids = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        self._known = lru_cache(_KNOWN_TEXTS)(self._literally)
        self._literal = literal
        self._size = len(self.tokenizer)

    def prompt(self, text: str) -> list[int]:
        """Tokenise the start of a prompt; special tokens are added unless the text has them.

        Only those in front are added: an end-of-sequence token would end the prompt before its
        contexts.
        """
        first, *others = text.split(GUARD)
        ids = self._plain_ids(first)
        bos = self.tokenizer.bos_token
        if not (bos and text.startswith(bos)):
            with_added = self._ids(self.tokenizer, first, add_special_tokens=True)
            for added in range(len(with_added) - len(ids) + 1):
                if with_added[added : added + len(ids)] == ids:
                    ids = with_added[: added + len(ids)]
                    break
        return ids + [token for piece in others for token in self.rest(piece)]

    def rest(self, text: str) -> list[int]:
        """Tokenise prompt text that follows something; nothing is added."""
        return [token for piece in text.split(GUARD) for token in self._follow(piece)]

    def literal(self, text: str) -> list[int]:
        """Tokenise retrieved text, as what follows something; special tokens become characters.

        The same documents are retrieved again and again, so their ids are kept.
        """
        if len(self.tokenizer) != self._size:  # tokens were added meanwhile
            self._copy()
        known = self._known if len(text) <= _KNOWN_LENGTH else self._literally
        return known(text).tolist()

    def _literally(self, text: str) -> array[int]:
        return array("i", self._literal_tokens(unguarded(text)))

    def _literal_tokens(self, text: str) -> list[int]:
        ids = self._follow(text, literal=True)
        if not self._special_ids.intersection(ids):
            return ids
        # Unigram models find special tokens among their pieces all the same.
        pieces = guarded(text, self.tokenizer.all_special_tokens).split(GUARD)
        return [token for piece in pieces for token in self._follow(piece, literal=True)]

    def _follow(self, text: str, *, literal: bool = False) -> list[int]:
        """Tokenise text that does not stand at the start of a prompt."""
        ids = self._literal_ids if literal else self._plain_ids
        return _behind(ids, text) if self._changes_starts else ids(text)

    def _plain_ids(self, text: str) -> list[int]:
        return self._ids(self.tokenizer, text, add_special_tokens=False)

    def _literal_ids(self, text: str) -> list[int]:
        return self._ids(self._literal, text, add_special_tokens=False, split_special_tokens=True)

    def default_prefix(self, text: str) -> list[int]:
        """Return the ids of a prefix for prompts that start with a context."""
        bos = self.tokenizer.bos_token_id
        return ([] if bos is None else [bos]) + self.rest(text)

    @staticmethod
    def _ids(tokenizer: Any, text: str, **kwargs: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:  # halves of characters, as some readers of PDF files give them
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
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

    def joins_next(self, token: int) -> bool:
        """Whether a token's text changes when another one follows, as that of a joiner does."""
        if token not in self._joining:
            alone = self.decode([token])
            pairs = (self.decode([token, follower]) for follower in self._followers)
            self._joining[token] = not all(pair.startswith(alone) for pair in pairs)
        return self._joining[token]


def _behind(tokenize: Callable[[str], list[int]], text: str) -> list[int]:
    """Tokenise a text as it is tokenised behind another one.

    Many tokenizers put a space before whatever they are given, which a text in the middle of a
    prompt does not have.
    """
    for before in _BEFORE:
        head, whole = tokenize(before), tokenize(before + text)
        # Otherwise the two texts have a token in common, and another one may have none.
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return tokenize(text)


class IncrementalDecoder:
    """Turns token ids into text piece by piece; pieces joined are the decoded whole.

    A piece is held back while it ends in an incomplete character, or in a token whose text depends
    on the next one.
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
        if len(text) <= len(known):
            return ""
        if not last and (text.endswith("\ufffd") or self._tokens.joins_next(self._ids[-1])):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return text[len(known) :]
