"""Where a registered text may begin and end inside a prompt."""

from __future__ import annotations

import heapq
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ape_integrations.core.markup import ChatMarkup
from ape_integrations.core.registry import ContextRegistry

# Candidate starts: words, and what follows a script without spaces' punctuation. Cheap and
# generous; `_begins` decides.
_CANDIDATE = re.compile(
    r"(?:[\s>\]:\uff1a\"'`=(|.,;!?*\u2013\u2014\u2192\u201c\u3000-\u301f\uff00-\uff0f\uff1b-]|\\n|\A)"
    r"[ \t\u00a0\u3000]*(?=\S)"
)
_BULLET = re.compile(
    r"^[ \t]*(?:(?:[-*•#|]+|\(?(?:\d{1,4}|[a-z])[.)]|#\d{1,4}[.):]?)[ \t]+|\d{1,4}\u3001)",
    re.MULTILINE,
)
_MAX_BULLET = 16
_OPENING = re.compile(r"(?:\A|[\[({,:=>\n]|\\n)[ \t]*[\"'`]{1,3}[ \t]*\Z")

_TAG = r"<[/!?|\w\uff5c]"
_WORD_END = re.compile(rf"[ \t]*(?:\Z|[\r\n]|{_TAG})")
_TEXT_END = re.compile(
    rf"[ \t]*(?:\Z|[\r\n]|{_TAG}|\\[nr]|\[/?[A-Z_]{{3,}}\]|[\]}})|]|-{{3}}|={{3}}|\#{{2}}|\*{{2}}"
    rf"|,[ \t]*\"|[\"'`]{{1,3}}[ \t]*(?:\Z|[\]}}).,:;\r\n]|{_TAG}|\\[nr]))"
)
_LABEL_AFTER = re.compile(r"[ \t]+[A-Z][\w ]{0,24}:")
_QUOTE_AFTER = re.compile(r"[ \t]*[\"'`\u201d\u300d]")
# That of the sentence it was put into.
_STOP_AFTER = re.compile(r"(?<=[.!?])\.(?=\s|\Z)|(?<=[\u3002\uff01\uff1f])\u3002")
_BRACKET_AFTER = re.compile(r"[ \t]*[\u3008-\u3011\uff09]")
# "(source: a.txt)", "[2]" or "- a.txt" up to the end of the line.
_ASIDE_AFTER = re.compile(
    r"(?:[ \t]*[(\[\uff08][^\n]{1,120}[)\]\uff09]|[ \t]+[\u2013\u2014-][ \t]+[^\n]{1,60})"
    rf"[ \t.]*(?:\Z|[\r\n]|{_TAG}|\[/?[A-Z_]{{3,}}\])"
)
_AFTER_LONG = (_LABEL_AFTER, _QUOTE_AFTER, _STOP_AFTER, _BRACKET_AFTER, _ASIDE_AFTER)
# The sentence that several texts were put into goes on.
_SENTENCE_AFTER = re.compile(r"[,;.]?[ \t]|(?<=[\u3002\uff01\uff1f])(?=\S)")
# A line that begins with "(a.txt)", "**a.txt**" or "a.txt" and a tab.
_ASIDE_BEFORE = re.compile(
    r"[ \t>*\u2022-]*(?:[(\[\uff08].{1,80}[)\]\uff09]|\*\*.{1,80}\*\*|[^\t]{1,80}\t)[ \t]*"
)
_LONGEST_ASIDE = 100
_OPENERS = "=(|\u2013\u2014\u2192\u201c\uff08\uff09"  # before a long text, besides CJK brackets
_LONGEST_WORD = 32  # characters; longer text without a space is a sentence of a script without
# Characters from which a text may begin in a line, and be followed by a label or another text.
_LONG_TEXT = 40
_JOINT = re.compile(
    r"[ \t]*[,;|/\u00b7\u2022\u2013\u2014-]{0,3}[ \t]+"
    r"|[\u3001\u3002\uff0c\uff1b]|(?<=[\u3002\uff01\uff1f])"
)
_SEPARATOR = re.compile(rf"[ \t]*\n\s*|{_JOINT.pattern}")

# Who speaks in a transcript, and a chain's own earlier answer ("Original Answer: ...").
_SPEAKER = re.compile(
    r"^[ \t#*_]*(?:(?:user|human|system|tool)|(?P<role>assistant|ai|bot|chatbot|agent)"
    r"|(?P<answer>(?:[^\W\d_]+ ){0,4}(?:existing|original|previous|current|first|earlier|prior|last"
    r"|final) (?:answer|response)|answer|response))"
    r"(?:[ \t]*\([^()\n]{1,24}\))?[ \t*_]*[:\uff1a](?=[ \t*_]*\S)",
    re.IGNORECASE | re.MULTILINE,
)
# What ends an answer inside a message: an empty line, a rule, or a line that begins with a label.
_ANSWER_END = re.compile(r"\n[ \t]*(?:\n|[-=*#_]{3,}|[^\W\d_][^\n:\uff1a]{0,60}[:\uff1a])")
_LONGEST_ANSWER = 4000  # characters that are searched for its label


@dataclass(frozen=True)
class Found:
    """Where the registered texts of a prompt stand.

    Parameters
    ----------
    spans : list of (int, int)
        Start and end of each that counts, ascending, without overlaps.
    overlooked : int
        Long ones that stand inside other text and do not count.
    """

    spans: list[tuple[int, int]]
    overlooked: int = 0


def find_contexts(prompt: str, registry: ContextRegistry, markup: ChatMarkup) -> Found:
    """Find the registered texts that a prompt contains as texts of their own.

    A text counts where a line, a label, markup or a quoted string begins, and ends where one of
    them ends, or where another one follows. A single word must fill a line or a piece of markup.
    What lies inside a known query string is part of the question, and what an earlier answer says
    is part of the conversation.

    Parameters
    ----------
    prompt : str
    registry : ContextRegistry
    markup : ChatMarkup

    """
    if not len(registry):
        return Found([])
    search = _Search(prompt, registry, markup)
    spans = registry.find(prompt, search.positions(), search.accept)
    return Found(spans, search.overlooked)


class _Search:
    """Looks for the texts of one prompt, from its start to its end."""

    def __init__(self, prompt: str, registry: ContextRegistry, markup: ChatMarkup) -> None:
        self._prompt, self._registry, self._markup = prompt, registry, markup
        self._queries = registry.queries(prompt)
        self._joined = "\0".join(self._queries)
        self._turns = markup.turns(prompt)
        self._turn_ends = [turn.end for turn in self._turns]
        self._found: list[tuple[int, int]] = []
        self._follows: int | None = None  # where a text follows the last one in its line
        self._joined_at = -1
        self.overlooked = 0

    def positions(self) -> Iterator[int]:
        """Yield where texts may begin, ascending; what lies inside an accepted one is left out."""
        tokens = iter(self._markup.token_ends(self._prompt))
        for position in heapq.merge(self._scan(_CANDIDATE), self._scan(_BULLET), tokens):
            while self._follows is not None and self._follows <= position:
                yield self._neighbour()
            yield position
        while self._follows is not None:
            yield self._neighbour()

    def _neighbour(self) -> int:
        assert self._follows is not None
        self._joined_at, self._follows = self._follows, None
        return self._joined_at

    def _scan(self, pattern: re.Pattern[str]) -> Iterator[int]:
        position = 0
        while match := pattern.search(self._prompt, position):
            yield match.end()
            position = max(match.end(), match.start() + 1, self._found[-1][1] if self._found else 0)

    def accept(self, start: int, end: int) -> bool:
        """Say whether a registered text counts, and remember it."""
        prompt, long = self._prompt, end - start >= _LONG_TEXT
        word = end - start <= _LONGEST_WORD and not any(map(str.isspace, prompt[start:end]))
        joined = self._follower(_JOINT, end) if long else None
        begins = start == self._joined_at or _begins(prompt, start, word, long, self._markup)
        ends = joined is not None or _ends(prompt, end, word, long, self._markup)
        if long and self._is_next(start):
            ends = ends or _SENTENCE_AFTER.match(prompt, end) is not None
        # One that begins inside a sentence ("Here are the facts. ...") is the first of several.
        begins = begins or (long and self._follower(_SEPARATOR, end) is not None)
        if self._is_said(start, end):
            return False
        if not (begins and ends):
            self.overlooked += long
            return False
        self._found.append((start, end))
        self._follows = joined
        return True

    def _follower(self, separator: re.Pattern[str], end: int) -> int | None:
        """Return where a long text begins behind a separator, if one does."""
        match = separator.match(self._prompt, end)
        if match is None:
            return None
        texts = self._registry.texts_at(self._prompt, match.end())
        return match.end() if any(len(text) >= _LONG_TEXT for text in texts) else None

    def _is_said(self, start: int, end: int) -> bool:
        """Whether a text is part of the question or of an earlier answer."""
        text = self._prompt[start:end]
        if text in self._joined and _inside_query(self._prompt, start, end, self._queries):
            return True
        if self._is_next(start):
            return False
        earlier = reversed(self._turns[: bisect_right(self._turn_ends, start)])
        # A text may itself hold what looks like a header.
        turn = next((turn for turn in earlier if not self._is_in_text(turn.start)), None)
        opened = 0 if turn is None else turn.end
        if turn is not None and turn.is_answer:
            return not self._markup.has_token(self._prompt[opened:start])
        searched = max(opened, start - _LONGEST_ANSWER), start + 1
        spoken = [m for m in _SPEAKER.finditer(self._prompt, *searched) if m.end() <= start]
        labels = [match for match in spoken if not self._is_in_text(match.start())]
        if not labels or not (labels[-1]["role"] or labels[-1]["answer"]):
            return False
        after = labels[-1].end()
        # "Answer: in one sentence.", and then the texts.
        below = labels[-1]["answer"] and "\n" in self._prompt[after:start]
        if below and self._follower(_SEPARATOR, end) is not None:
            return False
        return _ANSWER_END.search(self._prompt, after, start) is None

    def _is_next(self, start: int) -> bool:
        """Whether nothing stands between the last text that counts and a position."""
        return bool(self._found) and not self._prompt[self._found[-1][1] : start].strip()

    def _is_in_text(self, position: int) -> bool:
        return any(start <= position < end for start, end in self._found)


def _begins(prompt: str, start: int, word: bool, long: bool, markup: ChatMarkup) -> bool:
    edge = start
    while edge and prompt[edge - 1] in " \t\u00a0\u3000":
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
    if long and (before in _OPENERS or "\u3008" <= before <= "\u3011"):
        return True
    if long and before == "-" and prompt[edge - 2 : edge - 1].isspace():
        return True
    if before in ("'", '"', "`"):
        return _OPENING.search(prompt[max(0, edge - 16) : start]) is not None
    line = prompt[prompt.rfind("\n", max(0, start - _LONGEST_ASIDE), start) + 1 : start]
    if len(line) <= _MAX_BULLET and _BULLET.fullmatch(line):
        return True
    return long and len(line) < _LONGEST_ASIDE and _ASIDE_BEFORE.fullmatch(line) is not None


def _ends(prompt: str, end: int, word: bool, long: bool, markup: ChatMarkup) -> bool:
    if (_WORD_END if word else _TEXT_END).match(prompt, end) or markup.token_at(prompt, end):
        return True
    return long and any(after.match(prompt, end) for after in _AFTER_LONG)


def _inside_query(prompt: str, start: int, end: int, queries: Sequence[str]) -> bool:
    text = prompt[start:end]
    for query in queries:
        offset = query.find(text)
        while offset >= 0:
            if start >= offset and prompt.startswith(query, start - offset):
                return True
            offset = query.find(text, offset + 1)
    return False
