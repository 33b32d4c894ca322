"""Where a registered text may begin and end inside a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ape_integrations.core.markup import ChatMarkup
from ape_integrations.core.registry import ContextRegistry

# Candidate starts: after a line break, markup, a label's colon, a bracket, a quote or an escaped
# line break. Cheap and generous; `_begins` decides.
_CANDIDATE = re.compile(r"(?:\A|[\n>\]:\uff1a\"'`]|\\n)[ \t]*(?=\S)")
_BULLET = re.compile(r"^[ \t]*(?:[-*•#|]+|\(?\d{1,4}[.)])[ \t]+", re.MULTILINE)
_MAX_BULLET = 16
_OPENING = re.compile(r"(?:\A|[\[({,:=>\n]|\\n)[ \t]*[\"'`]{1,3}[ \t]*\Z")

_TAG = r"<[/!?|\w\uff5c]"
_WORD_END = re.compile(rf"[ \t]*(?:\Z|[\r\n]|{_TAG})")
_TEXT_END = re.compile(
    rf"[ \t]*(?:\Z|[\r\n]|{_TAG}|\\[nr]|\[/?[A-Z_]{{3,}}\]|[\]}})|]|-{{3}}|={{3}}|\#{{2}}|\*{{2}}"
    rf"|,[ \t]*\"|[\"'`]{{1,3}}[ \t]*(?:\Z|[\]}}).,:;\r\n]|{_TAG}|\\[nr]))"
)
_LABEL_AFTER = re.compile(r"[ \t]+[A-Z][\w ]{0,24}:")
_LONGEST_WORD = 32  # characters; longer text without a space is a sentence of a script without
_LONG_TEXT = 40  # characters from which a text may be followed by a label on its own line


def find_contexts(
    prompt: str, registry: ContextRegistry, markup: ChatMarkup
) -> list[tuple[int, int]]:
    """Find the registered texts that a prompt contains as texts of their own.

    A text counts where a line, a label, markup or a quoted string begins, and ends where one of
    them ends. A single word must fill a line or a piece of markup. What lies inside a known query
    string is part of the question.

    Parameters
    ----------
    prompt : str
    registry : ContextRegistry
    markup : ChatMarkup

    Returns
    -------
    list of (int, int)
        Start and end of each, ascending, without overlaps.
    """
    if not len(registry):
        return []
    queries = registry.queries(prompt)
    joined = "\0".join(queries)

    def accept(start: int, end: int) -> bool:
        word = end - start <= _LONGEST_WORD and not any(map(str.isspace, prompt[start:end]))
        return (
            _begins(prompt, start, word, markup)
            and _ends(prompt, start, end, word, markup)
            and not (prompt[start:end] in joined and _inside_query(prompt, start, end, queries))
        )

    starts = {match.end() for match in _CANDIDATE.finditer(prompt)}
    starts.update(match.end() for match in _BULLET.finditer(prompt))
    starts.update(markup.token_ends(prompt))
    return registry.find(prompt, sorted(starts), accept)


def _begins(prompt: str, start: int, word: bool, markup: ChatMarkup) -> bool:
    edge = start
    while edge and prompt[edge - 1] in " \t":
        edge -= 1
    before = prompt[edge - 1 : edge]
    if before in ("", "\n"):
        return True
    if before == ">" or markup.token_ends_at(prompt, edge):
        return True
    if word:
        return False
    if before in (":", "\uff1a", "]") or prompt[edge - 2 : edge] == "\\n":
        return True
    if before in ("'", '"', "`"):
        return _OPENING.search(prompt[max(0, edge - 16) : start]) is not None
    line = prompt[prompt.rfind("\n", max(0, start - _MAX_BULLET), start) + 1 : start]
    return len(line) <= _MAX_BULLET and _BULLET.fullmatch(line) is not None


def _ends(prompt: str, start: int, end: int, word: bool, markup: ChatMarkup) -> bool:
    if (_WORD_END if word else _TEXT_END).match(prompt, end) or markup.token_at(prompt, end):
        return True
    return end - start >= _LONG_TEXT and _LABEL_AFTER.match(prompt, end) is not None


def _inside_query(prompt: str, start: int, end: int, queries: Sequence[str]) -> bool:
    text = prompt[start:end]
    for query in queries:
        offset = query.find(text)
        while offset >= 0:
            if start >= offset and prompt.startswith(query, start - offset):
                return True
            offset = query.find(text, offset + 1)
    return False
