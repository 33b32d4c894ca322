"""Small tokenizers of the kinds that model families use."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

_SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-<>|/\n"
_MERGES = ["t h", "th e", "i s", "▁ P", "▁P a", "P a", "Pa r", "▁Pa r", "▁ the", "▁ is", "r i"]


def _wrapped(tokenizer: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|end|>"],
        **kwargs,
    )


def _sentencepiece(scheme: str, *, byte_fallback: bool = True) -> Tokenizer:
    """Return a BPE tokenizer as SentencePiece trains them, with a rule for leading spaces."""
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
    merged = [merge.replace(" ", "") for merge in _MERGES]
    pieces += ["▁", *(c for c in _CHARACTERS if c != "\n" or not byte_fallback), *merged]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge.split()) for merge in _MERGES]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback
        )
    )
    replace = normalizers.Replace(" ", "▁")
    if scheme == "prepend":  # the old form: a normaliser that knows no pieces
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif scheme == "none":
        tokenizer.normalizer = replace
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if scheme == "none" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([*steps, *strip])
    return tokenizer


def _with_ends(tokenizer: Tokenizer, template: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def _unigram() -> Tokenizer:
    pieces = [*((piece, 0.0) for piece in _SPECIAL), ("▁", -3.0)]
    pieces += [(c, -5.0) for c in _CHARACTERS] + [("▁Pa", -4.0), ("▁the", -4.0), ("is", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def _byte_level(*, add_prefix_space: bool, llama3: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*_SPECIAL, *alphabet, "ĊĊ", "Ġt", "Pa"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("P", "a")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    if llama3:
        pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZERS = {
    "Llama 2, Mistral 7B (space before everything, byte fallback)": lambda: _wrapped(
        _with_ends(_sentencepiece("prepend"), "<s> $A")
    ),
    "Llama 2, newer form (space before the first piece)": lambda: _wrapped(
        _with_ends(_sentencepiece("first"), "<s> $A")
    ),
    "Phi-3 (space before every piece)": lambda: _wrapped(_sentencepiece("always")),
    "Gemma (no space, byte fallback)": lambda: _wrapped(
        _with_ends(_sentencepiece("none"), "<s> $A")
    ),
    "BPE of characters (no byte fallback)": lambda: _wrapped(
        _sentencepiece("first", byte_fallback=False)
    ),
    "Unigram": lambda: _wrapped(_unigram()),
    "GPT-2, Qwen (bytes, no BOS)": lambda: _wrapped(_byte_level(add_prefix_space=False)),
    "RoBERTa, OPT (bytes, space before)": lambda: _wrapped(_byte_level(add_prefix_space=True)),
    "Llama 3 (bytes, BOS)": lambda: _wrapped(
        _with_ends(_byte_level(add_prefix_space=False, llama3=True), "<s> $A")
    ),
    "BOS and EOS around every text": lambda: _wrapped(
        _with_ends(_sentencepiece("first"), "<s> $A </s>")
    ),
    "ByT5 (bytes in Python, EOS after every text)": lambda: ByT5Tokenizer(extra_ids=0),
}
