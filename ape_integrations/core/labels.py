"""Labels and trailers: the short text around a context that belongs to it."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ape_integrations.core.markup import ChatMarkup
from ape_integrations.core.stable_prefix import is_telling

_MAX_LABEL = 200  # characters; longer text between two contexts is not a label
_SEARCHED = 2 * _MAX_LABEL  # characters searched for a label that is shaped like others
_REMEMBERED = 256  # shapes, and heads whose label is decided

# "Source 1:", "[2] ", "Document (3):", "4. "
_NUMBERED = re.compile(
    r"\W*(?:(?:[^\W\d_]+[ _]){0,2}[^\W\d_]*[ _]?[#\[(]{0,2}\d{1,4}[\])]{0,2}[:\uff1a>\])]"
    r"|\d{1,3}[.)])[:\uff1a\s]*"
)
_CLOSING_TAGS = re.compile(r"(?:\s*</[\w:.-]+>)+")
# "\nSource: a.txt\n\nContent: ": a trailer of the context before, then a label of the next.
_ADJACENT = re.compile(r"(?:\n(?=[^\n]*[^\W_])[^\n]*)+?(?=\n[ \t]*\n)")
_BREAK = re.compile(r"\n|\\n")  # line breaks, also those of JSON strings
_ESCAPED = re.compile(r"\\[nrt]")
_FIELD = re.compile(r"\s*([^\s:\uff1a<][^:\uff1a\n<]{0,39})[:\uff1a]")
# "Query: ...", "The original query is as follows: ...", "Thought: ..."
_QUESTION = re.compile(
    r"^[^\n:\uff1a]{0,40}\b(?:query|question|thought|action|follow.?up)\b[^\n:\uff1a]{0,24}[:\uff1a]",
    re.IGNORECASE | re.MULTILINE,
)
_OPEN_TAG = re.compile(r"\s*<([/\w:.-]+)")


@dataclass(frozen=True)
class Gap:
    """Text between two contexts; what is in none of the parts is mere separator."""

    trailer: str  # belongs to the context before it
    moved: str  # belongs to the query
    label: str  # belongs to the context after it


class Labels:
    """Tells labels from separators, also before the first and after the last context.

    What stands before the first context is a label if it has the shape of the labels of the later
    ones. Shapes are remembered, so that a prompt with a single context is treated like its
    siblings. Thread-safe.
    """

    def __init__(self, markup: ChatMarkup) -> None:
        self._markup = markup
        self._lock = threading.Lock()
        self._label_shapes: OrderedDict[str, None] = OrderedDict()
        self._trailer_shapes: OrderedDict[str, None] = OrderedDict()
        self._decided: OrderedDict[tuple[int, int], int] = OrderedDict()

    def divide(self, gaps: Sequence[str], queries: Sequence[str] = ()) -> list[Gap]:
        """Divide the texts between the contexts of one prompt; a known query is no label."""
        labels = (text for text in gaps if not self._is_long(text) and not _asks(text, queries))
        short = {text: self._divide_short(text) for text in labels}
        self._remember(self._label_shapes, [gap.label for gap in short.values()])
        self._remember(self._trailer_shapes, [gap.trailer for gap in short.values()])
        return [short.get(text) or self._divide_long(text) for text in gaps]

    def _is_long(self, gap: str) -> bool:
        is_conversation = self._markup.has_token(gap) or bool(self._markup.turns(gap))
        return is_conversation or len(gap.strip()) > _MAX_LABEL

    def _divide_short(self, gap: str) -> Gap:
        """Divide a gap that holds nothing but a trailer and a label."""
        if not has_words(gap):
            return Gap("", "", "")
        match = _CLOSING_TAGS.match(gap) or _ADJACENT.match(gap)
        trailer = gap[: match.end()] if match else ""
        if trailer and not _CLOSING_TAGS.match(gap) and not has_words(gap[len(trailer) :]):
            trailer = ""  # nothing would be left to label the next context
        return Gap(trailer, "", _without_separators(gap[len(trailer) :]))

    def _divide_long(self, gap: str) -> Gap:
        """Divide a gap that holds conversation turns or other text for the query."""
        trailer = self._match_trailer(gap, self._known(self._trailer_shapes))
        label = self._single_label(gap[trailer:])
        return Gap(gap[:trailer], gap[trailer : len(gap) - label], gap[len(gap) - label :])

    def first_label(self, head: str, gaps: Sequence[Gap]) -> int:
        """Length of the label at the end of the text before the first context."""
        plain = [gap for gap in gaps if not gap.moved]
        if plain:
            return self._match_label(head, _shapes(gap.label for gap in plain))
        key = (len(head), hash(head))
        with self._lock:
            known = self._decided.get(key)
        length = self._single_label(head) if known is None else known
        if length:  # the shape of a head's label may be learned yet
            with self._lock:
                self._decided[key] = length
                self._decided.move_to_end(key)
                if len(self._decided) > _REMEMBERED:
                    self._decided.popitem(last=False)
        return length

    def _single_label(self, head: str) -> int:
        """Length of a label that no other label of the same prompt explains."""
        length = self._match_label(head, self._known(self._label_shapes))
        if length:
            return length
        last_line = head[self._markup.boundary(head, len(head.rstrip())) :]
        return len(last_line) if _NUMBERED.fullmatch(last_line) else 0

    def last_trailer(self, tail: str, gaps: Sequence[Gap]) -> int:
        """Length of the trailer at the beginning of the text after the last context."""
        plain = [gap for gap in gaps if not gap.moved]
        if plain:
            return self._match_trailer(tail, _shapes(gap.trailer for gap in plain))
        return self._match_trailer(tail, self._known(self._trailer_shapes))

    def _match_label(self, head: str, shapes: Sequence[str]) -> int:
        breaks = [match.end() for match in _BREAK.finditer(head, max(0, len(head) - _SEARCHED))]
        for wanted in shapes:
            lines = wanted.count("\n") + 1
            if len(breaks) < lines and len(head) > _SEARCHED:
                continue
            start = breaks[-lines] if len(breaks) >= lines else 0
            start += max(self._markup.token_ends(head[start:]), default=0)
            label = head[start:].lstrip(" \t\"'[{")
            if shape(label) == wanted:
                return len(label)
        return 0

    def _match_trailer(self, tail: str, shapes: Sequence[str]) -> int:
        whole, tail = len(tail), tail[: self._markup.first_token(tail[:_SEARCHED])]
        breaks = [match.start() for match in _BREAK.finditer(tail)]
        closing = _CLOSING_TAGS.match(tail)
        for wanted in shapes:
            lines = wanted.count("\n") + 1
            if len(breaks) < lines and len(tail) == _SEARCHED < whole:
                continue
            end = breaks[lines - 1] if len(breaks) >= lines else len(tail)
            if shape(tail[:end]) == wanted:
                return min(end, closing.end()) if closing else end
        return 0

    def _known(self, shapes: OrderedDict[str, None]) -> list[str]:
        with self._lock:
            return list(reversed(shapes))

    def _remember(self, memory: OrderedDict[str, None], texts: Sequence[str]) -> None:
        with self._lock:
            for one in _shapes(texts):
                memory[one] = None
                memory.move_to_end(one)
            while len(memory) > _REMEMBERED:
                memory.popitem(last=False)


def _asks(gap: str, queries: Sequence[str]) -> bool:
    return _QUESTION.search(gap) is not None or any(q in gap for q in queries if is_telling(q))


def _shapes(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(shape(text) for text in texts if text))


def shape(label: str) -> str:
    """Return what stays of a label when its numbers and values change.

    A line with a field name keeps the name, a line with a tag the tag's name; digits become ``#``.
    """
    lines = []
    for line in _BREAK.split(label):
        name = _OPEN_TAG.match(line) or _FIELD.match(line)
        lines.append(re.sub(r"\d+", "#", name.group() if name else line.rstrip()))
    return "\n".join(lines)


def has_words(text: str) -> bool:
    """Whether a text holds a letter or digit; escaped line breaks of JSON strings do not count."""
    return any(map(str.isalnum, _ESCAPED.sub("", text)))


def _without_separators(text: str) -> str:
    """Drop leading lines without a letter or digit, and what separates records."""
    while (line := _BREAK.search(text)) and not has_words(text[: line.start()]):
        text = text[line.end() :]
    return text.lstrip(" \t\"'[{}]),")
