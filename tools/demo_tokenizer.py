"""Build the word-level tokenizer of the demo model, with a byte fallback for everything else.

Whole words of the closed world are single tokens, and a word is the same token at the start of a
line, after a space and after a bracket. A small model can only bind a name to its value when the
name is one and the same token in the document, in the question and in its own answer.

A word token carries a marker that stands for "one space before, or none at the start of a line".
Where neither is true (``(Ada``, ``file_path``) a separate joiner token goes in front. Markers are
inserted by the normalizer and undone by the decoder, so that decoding what was encoded gives the
same text, whatever the text is.
"""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

WORD_MARK = "\u2581"
JOINER = "\u2040"
BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (PAD, BOS, END, *(f"<|{role}|>" for role in ROLES))

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = message['role'] %}"
    "{% if role in ['developer'] %}{% set role = 'system' %}"
    "{% elif role in ['function', 'ipython'] %}{% set role = 'tool' %}"
    "{% elif role not in ['system', 'user', 'assistant', 'tool'] %}{% set role = 'user' %}"
    "{% endif %}"
    "{% set content = message['content'] %}"
    "{{ '<|' + role + '|>' }}"
    "{% if content is string %}{{ content }}"
    "{% elif content %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_LETTER = r"\p{L}\p{M}"
_START_OF_WORD = rf"(?=[{_LETTER}\p{{N}}])(?<![{_LETTER}\p{{N}}])(?<![{_LETTER}\p{{N}}]['\u2019])"
_PIECES = (
    rf"{WORD_MARK}?[{_LETTER}]+(?:['\u2019][{_LETTER}]+)*"  # words, "don't" included
    rf"|{WORD_MARK}?\p{{N}}+"
    r"|-+| +|."
    "|\\n"
)
# Private-use stand-ins for marker characters that the text itself contains.
_ESCAPES = ((WORD_MARK, "\ue000"), (JOINER, "\ue001"))


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            *(normalizers.Replace(mark, escape) for mark, escape in _ESCAPES),
            normalizers.Replace(Regex(rf"(?<=[^\n ]) {_START_OF_WORD}"), WORD_MARK),
            normalizers.Replace(Regex(rf"(?<![^\n]){_START_OF_WORD}"), WORD_MARK),
            normalizers.Replace(Regex(rf"(?<!{WORD_MARK}){_START_OF_WORD}"), JOINER + WORD_MARK),
        ]
    )


def _decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(JOINER + WORD_MARK, ""),
            decoders.Replace(Regex(rf"(?<![^\n]){WORD_MARK}"), ""),
            decoders.Replace(Regex(rf"(?<=\|>){WORD_MARK}"), ""),
            decoders.Replace(WORD_MARK, " "),
            *(decoders.Replace(escape, mark) for mark, escape in _ESCAPES),
        ]
    )


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer in which each of `words` is one token.

    Parameters
    ----------
    words : iterable of str
        Words, numbers and runs of punctuation without spaces inside.

    Returns
    -------
    transformers.PreTrainedTokenizerFast
        With chat template, ``<|bos|>`` in front of plain text, ``<|end|>`` as end of sequence.
    """
    vocabulary: dict[str, float] = {token: 0.0 for token in SPECIAL_TOKENS}
    vocabulary.update({f"<0x{byte:02X}>": -20.0 for byte in range(256)})
    for char in [WORD_MARK, JOINER, "\n", *string.printable[:95]]:
        vocabulary.setdefault(char, -10.0)
    for word in sorted(set(words)):
        token = WORD_MARK + word if word[0].isalnum() else word
        vocabulary.setdefault(token, -1.0)
    tokenizer = Tokenizer(
        Unigram(list(vocabulary.items()), unk_id=len(SPECIAL_TOKENS), byte_fallback=True)
    )
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.decoder = _decoder()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary_index(vocabulary, BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def vocabulary_index(vocabulary: dict[str, float], token: str) -> int:
    """Return the id of `token`: its rank in the insertion order of `vocabulary`."""
    return list(vocabulary).index(token)
