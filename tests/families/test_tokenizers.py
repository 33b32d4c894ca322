"""Tokenizers: parts are read as inside a prompt, BOS once, EOS never, and text streams whole."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from ape_integrations.core.loading import bundled_model
from ape_integrations.core.tokens import IncrementalDecoder, Tokens
from tests.families.tokenizers import TOKENIZERS

TEXTS = [
    "Paris is the capital.",
    "the end\n\nof: it",
    "12 months, 5 €",
    "été and so on\n\n",
    "?!",
]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def plain(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a whole prompt, special tokens in it as characters."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("before", ["Read this.\n", "x:", "Text 1\n"])
def test_context_alone_is_tokenised_as_inside_a_prompt(
    tokenizer: Any, text: str, before: str
) -> None:
    """No space is put before it that a prompt does not have."""
    tokenizer.split_special_tokens = True
    whole, ids = plain(tokenizer, before + text), Tokens(tokenizer).literal(text)
    assert whole[len(whole) - len(ids) :] == ids
    assert whole[: len(whole) - len(ids)] == plain(tokenizer, before)


@pytest.mark.parametrize("text", [" the end", "\nPar is", "the<|end|>Par", "<|end|>\nis", "Par"])
def test_query_alone_is_tokenised_as_inside_a_prompt(tokenizer: Any, text: str) -> None:
    """Special tokens of a chat template included."""
    ids = Tokens(tokenizer).rest(text)
    whole = tokenizer("Text:" + text, add_special_tokens=False).input_ids
    assert whole[len(whole) - len(ids) :] == ids
    assert whole[: len(whole) - len(ids)] == tokenizer("Text:", add_special_tokens=False).input_ids


def test_prompt_starts_with_bos_once_and_never_ends_with_eos(tokenizer: Any) -> None:
    tokens = Tokens(tokenizer)
    given = tokenizer("the text").input_ids
    ids = tokens.prompt("the text")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[-1] != eos
    assert ids == (given[:-1] if given[-1] == eos else given)
    if bos is not None:
        assert tokens.prompt("<s>the text").count(bos) == 1
        assert tokens.default_prefix("\n\n").count(bos) == 1
    assert eos not in tokens.default_prefix("\n\n")


def test_context_has_no_special_tokens(tokenizer: Any) -> None:
    ids = Tokens(tokenizer).literal("a <s> forged </s> turn <|end|>")
    assert not set(ids) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def test_text_that_comes_again_is_not_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(next(iter(TOKENIZERS.values()))())
    tokenised: list[str] = []
    ids_of = tokens._literal_tokens
    monkeypatch.setattr(
        tokens, "_literal_tokens", lambda text: tokenised.append(text) or ids_of(text)
    )
    first = tokens.literal("a known text")
    first.append(-1)  # whoever gets ids owns them
    assert tokens.literal("a known text") == first[:-1]
    assert tokens.literal("another text") != first[:-1]
    long = "long " * 5000
    assert tokens.literal(long) == tokens.literal(long)
    assert tokenised == ["a known text", "another text", long, long]  # too long to keep


@pytest.mark.parametrize("text", ['{"city": "Geneva"}', "Zurich-West (since 1999)", "tea/time.txt"])
def test_text_of_a_joiner_is_held_back_until_what_it_joins_is_there(text: str) -> None:
    tokens = Tokens(AutoTokenizer.from_pretrained(bundled_model()))
    ids, decoder = tokens.rest(text), IncrementalDecoder(tokens)
    pieces = [decoder.push([token]) for token in ids]
    pieces.append(decoder.push([], last=True))
    assert "".join(pieces) == tokens.decode(ids) == text
    assert sum(map(bool, pieces)) > len(ids) / 2


@pytest.mark.parametrize(
    "text", ["Paris is the capital.", "  two  spaces ", "5 € and 1 ½\n\n the", " is", "日本 語 🙂!"]
)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_streamed_pieces_joined_are_the_decoded_whole(tokenizer: Any, text: str, step: int) -> None:
    """Spaces at the start of a piece survive, and characters of several tokens come whole."""
    tokens = Tokens(tokenizer)
    ids = tokens.rest(text)
    decoder = IncrementalDecoder(tokens)
    pieces = [decoder.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    pieces.append(decoder.push([], last=True))
    assert "".join(pieces) == tokens.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
