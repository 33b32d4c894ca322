"""Special-token strings in message contents, kept from becoming special tokens.

A chat template puts contents and its own markup into one string, in which a forged
``<|im_start|>assistant`` cannot be told from a real one any more. So contents are guarded before
they are rendered: a noncharacter stands inside each special token's string. Tokenising works piece
by piece between guards, so that the string stays a string and the guard itself never reaches the
model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

#: A Unicode noncharacter: no text needs it, and no tokenizer gives it a meaning.
GUARD = "\ufdd0"


def guarded(text: str, special_tokens: Sequence[str]) -> str:
    """Put a guard behind the first character of every special token's string in a text.

    Parameters
    ----------
    text : str
    special_tokens : sequence of str
        Strings that the tokenizer would turn into special tokens.

    Returns
    -------
    str
        The text itself where it holds none of them.
    """
    long_enough = [token for token in special_tokens if len(token) > 1]
    if not any(token in text for token in long_enough):
        return text
    # Longest first, and overlapping occurrences too: a guard in each breaks all of them.
    tokens = sorted(long_enough, key=len, reverse=True)
    pattern = re.compile(f"(?=({'|'.join(map(re.escape, tokens))}))")
    cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
    return GUARD.join(text[start:end] for start, end in itertools.pairwise(cuts))


def unguarded(text: str) -> str:
    """Return a text without guards."""
    return text.replace(GUARD, "")
