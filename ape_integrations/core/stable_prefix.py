"""How much of the text before the contexts stays the same from request to request."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ape_integrations.core.markup import ChatMarkup

# Shorter query strings, and few words that are no question, must stand alone on a line or after a
# label: they may be a name that the instructions mention as well.
_SHORT_QUERY, _FEW_WORDS = 12, 3
_SHORT_UNSPACED_QUERY = 5  # the same in a script whose characters are words or syllables
_WORTHWHILE = 20  # letters and digits that a common head needs to be more than a chat header
_COMPARED = 64  # most recent heads that a new one is compared with
_ALIKE = 3  # letters and digits by which the beginnings of two varying parts are the same
_REST = 48  # characters of a varying part by which its pipeline is recognised
_PATIENCE = 5  # earlier heads that must differ from a new one before it is held varying
_ONE_OFFS = 24  # heads without anything in common, each seen once, before a new one is held varying
_UNSPACED = "\u2e80"  # scripts without spaces between words: from the CJK blocks on

# "Question: ", "The original query is as follows: "
_LABEL = re.compile(r"\s*([^\n:\uff1a]{1,60})[:\uff1a](?=\s)")
_ASKED = re.compile(
    r"\b(?:question|query|input|message|request|frage|pregunta|pergunta|domanda|\u0432\u043e\u043f\u0440\u043e\u0441)\b"
    r"|\u95ee\u9898|\u554f\u984c|\u63d0\u95ee|\u8cea\u554f|\uc9c8\ubb38",
    re.IGNORECASE,
)
_QUESTION_MARKS = ("?", "\uff1f", "\u061f")
_ROLES = frozenset({"system", "developer", "user", "human", "assistant", "ai", "tool"})


@dataclass
class _Head:
    """A head that was seen, as far as the prompt's own evidence called it constant."""

    text: str
    cut: int  # how much of the text is held constant
    rest: str  # how the varying part began where a query string showed it
    sightings: set[int] = field(default_factory=set)

    @property
    def is_constant(self) -> bool:
        # Different questions came with it: it does not depend on the question.
        return len(self.sightings) > 1

    @property
    def was_cut(self) -> bool:
        return self.cut < len(self.text)

    def note(self, head: str, tail: str) -> None:
        if not self.is_constant:
            self.sightings.add(hash((head, tail)))


class PrefixMemory:
    """Decides where the constant head of a prompt ends. Thread-safe.

    Evidence, in this order: a known query string in the head; conversation turns before the message
    that holds the contexts; heads of earlier prompts. A head once decided keeps its cut, so that
    asking the same again always gives the same prefix.

    Parameters
    ----------
    markup : ChatMarkup
    max_heads : int
        Heads remembered; the least recently used ones leave first.
    """

    def __init__(self, markup: ChatMarkup, max_heads: int = 512) -> None:
        self._markup = markup
        self._max_heads = max_heads
        self._lock = threading.Lock()
        self._cuts: OrderedDict[tuple[int, int], tuple[_Head, int]] = OrderedDict()
        self._heads: OrderedDict[str, _Head] = OrderedDict()

    def cut(self, head: str, tail: str, queries: Sequence[str]) -> int:
        """Return the length of the constant part of a head.

        Parameters
        ----------
        head : str
            Text before the first context.
        tail : str
            Text after the last context: heads that stay while tails change are constant.
        queries : sequence of str
            Known query strings.
        """
        key = (len(head), hash(head))  # long conversations are not kept whole
        with self._lock:
            if key not in self._cuts:
                self._cuts[key] = self._decide(head, queries)
            self._cuts.move_to_end(key)
            known, cut = self._cuts[key]
            known.note(head, tail)
            self._heads[known.text] = known
            self._heads.move_to_end(known.text)
            while len(self._cuts) > self._max_heads:
                self._cuts.popitem(last=False)
            while len(self._heads) > self._max_heads:
                self._heads.popitem(last=False)
            return cut

    def _decide(self, head: str, queries: Sequence[str]) -> tuple[_Head, int]:
        """Return what the prompt itself shows to be constant, and how much of that to keep."""
        by_query = query_cut(head, queries, self._markup)
        limit = min(by_query, turn_cut(head, self._markup))
        text = head[:limit]
        known = self._heads.get(text)
        if known is None:
            rest = head[limit : limit + _REST] if by_query == limit else ""
            known = _Head(text, self._compare(text, queries_known=bool(queries)), rest)
        return known, known.cut

    def _compare(self, text: str, queries_known: bool) -> int:
        """Cut a head not seen before where it leaves what it has in common with earlier ones.

        Parameters
        ----------
        text : str
        queries_known : bool
            Query strings are known, and none stands in the head. Then a head that differs from
            earlier ones is likelier another pipeline's than the same one's with another question.
        """
        patience = _PATIENCE if queries_known else 1
        recent = list(self._heads.values())[-_COMPARED:]
        for other in recent:
            if text.startswith(other.text) and self._is_alike(text[len(other.text) :], other.rest):
                return other.cut  # the same pipeline, asked something that was not registered
        related = []
        for other in (each for each in recent if not each.is_constant):
            length = _common_length(text, other.text)
            if length == min(len(text), len(other.text)):
                continue  # one goes on where the other ends: they do not contradict each other
            common = self._markup.boundary(text, length)
            alike = self._is_question_line(text, other.text, common, length, queries_known)
            related.append((common, alike, other))
        related.sort(key=lambda relation: relation[0], reverse=True)
        for common, alike, other in related:
            if common < related[0][0] or not (alike or self._is_worthwhile(text[:common])):
                continue
            if other.was_cut and other.cut <= common:
                return other.cut
            if alike:
                return common
        if len(related) >= patience and self._is_worthwhile(text[: related[patience - 1][0]]):
            return related[patience - 1][0]
        if patience == 1 and len(related) >= _ONE_OFFS:
            return related[_ONE_OFFS - 1][0]
        return len(text)

    def _is_worthwhile(self, common: str) -> bool:
        return self._count_words(common) >= _WORTHWHILE

    def _is_alike(self, text: str, rest: str) -> bool:
        return self._count_words(rest[: _common_length(text, rest)]) >= _ALIKE

    def _is_question_line(
        self, text: str, other: str, common: int, length: int, queries_known: bool
    ) -> bool:
        """Whether two heads differ in a question, or in the value of a label ("Question: ").

        Where queries are known, the label must be one of questions.
        """
        header = next((t.end for t in self._markup.turns(text[common:]) if t.start == 0), 0)
        label = _LABEL.match(text[common + header : length])
        if label is not None and (label.group(1).lower() in _ROLES or not queries_known):
            return label.group(1).lower() not in _ROLES
        if label is not None and _ASKED.search(label.group(1)):
            return True
        lines = (head[common:].partition("\n")[0] for head in (text, other))
        return all(any(mark in line for mark in _QUESTION_MARKS) for line in lines)

    def _count_words(self, text: str) -> int:
        """Count letters and digits outside message headers."""
        headers = sum(_count_alnum(text[t.start : t.end]) for t in self._markup.turns(text))
        return _count_alnum(text) - headers


def query_cut(head: str, queries: Sequence[str], markup: ChatMarkup) -> int:
    """Where the line or message begins that holds the first known query string; else the length."""
    first = len(head)
    for query in queries:
        position = _find_query(head, query, first)
        if position >= 0:
            first = position
    return markup.boundary(head, first) if first < len(head) else first


def _find_query(head: str, query: str, before: int) -> int:
    """First occurrence of a query that is not a part of a word, nor a stray word in a sentence."""
    position = head.find(query, 0, min(len(head), before + len(query)))
    while 0 <= position < before:
        end = position + len(query)
        left, right = head[max(0, position - 1) : position], head[end : end + 1]
        if not (_joins_word(left) or _joins_word(right)) and (
            is_telling(query) or _stands_alone(head, position, end)
        ):
            return position
        position = head.find(query, position + 1, min(len(head), before + len(query)))
    return -1


def is_telling(query: str) -> bool:
    """Whether a query would hardly stand in a sentence by chance."""
    if any(char >= _UNSPACED for char in query):
        return len(query) >= _SHORT_UNSPACED_QUERY
    if len(query) < _SHORT_QUERY:
        return False
    return len(query.split()) > _FEW_WORDS or query.endswith(_QUESTION_MARKS)


def _joins_word(char: str) -> bool:
    # Scripts written without spaces have words side by side.
    return char.isalnum() and char < _UNSPACED


def _stands_alone(head: str, start: int, end: int) -> bool:
    if not re.search(r"(?:\A|[\n>\]:\uff1a\"'`])[ \t]*\Z", head[max(0, start - 16) : start]):
        return False
    several_words = any(map(str.isspace, head[start:end]))
    return several_words or re.match(r"[ \t]*(?:\Z|[\n<\[\"'`])", head[end:]) is not None


def turn_cut(head: str, markup: ChatMarkup) -> int:
    """Where the first non-system turn begins if it is not the message that holds the contexts."""
    turns = markup.turns(head)
    for turn in turns[:-1]:
        if not turn.is_system:
            return turn.start
    return len(head)


def _count_alnum(text: str) -> int:
    return sum(map(str.isalnum, text))


def _common_length(first: str, second: str) -> int:
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
