"""Labels and trailers: the short text around a context that belongs to it.

A pipeline writes every document in the same form: what stands before its text (a label), the text,
what stands behind it (a trailer), and a separator. Between two texts a prompt shows the trailer of
one and the label of the next in one piece. Where to divide it shows in brackets and tags that open
and close, in lines (what stands in a text's own line belongs to it), and at the two ends: the text
before the first document ends with its label, and the text behind the last one begins with its
trailer.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ape_integrations.core.markup import ChatMarkup
from ape_integrations.core.shapes import BREAK, Form, has_words, label_start, shape, trailer_end
from ape_integrations.core.stable_prefix import is_telling

_MAX_LABEL = 200  # characters; longer text between two contexts is not a label
_SEARCHED = 2 * _MAX_LABEL  # characters searched for a label that is shaped like others
_REMEMBERED = 256  # shapes, and heads whose label is decided
_WORTHWHILE = 20  # letters and digits of a head by which a later one is recognised

# "Source 1:", "[2] ", "Document (3):", "4. "
_NUMBERED = re.compile(
    r"\W*(?:(?:[^\W\d_]+[ _]){0,2}[^\W\d_]*[ _]?[#\[(]{0,2}\d{1,4}[\])]{0,2}[:\uff1a>\])]"
    r"|\d{1,3}[.)])[:\uff1a\s]*"
)
# "Query: ...", "The original query is as follows: ...", "Thought: ..."
_QUESTION = re.compile(
    r"^[^\n:\uff1a]{0,40}\b(?:query|question|thought|action|follow.?up)\b[^\n:\uff1a]{0,24}[:\uff1a]",
    re.IGNORECASE | re.MULTILINE,
)
_NESTED = re.compile(
    r"(?P<opens>[{\[])|(?P<closes>[}\]])|<(?P<end>/)?[A-Za-z][\w:.-]*[^<>\n]*?(?P<empty>/)?>"
)


@dataclass(frozen=True)
class Gap:
    """Text between two contexts; what is in none of the parts is mere separator."""

    trailer: str  # belongs to the context before it
    moved: str  # belongs to the query
    label: str  # belongs to the context after it


@dataclass(frozen=True)
class Division:
    """What belongs to which context of a prompt.

    Parameters
    ----------
    first_label : int
        Characters before the first context.
    gaps : list of Gap
        What stands between the contexts.
    last_trailer : int
        Characters behind the last context.
    """

    first_label: int
    gaps: list[Gap]
    last_trailer: int


class Labels:
    """Tells labels from separators, also before the first and behind the last context.

    Shapes, and the texts before labelled contexts, are remembered, so that a prompt with a single
    context is treated like its siblings. Thread-safe.
    """

    def __init__(self, markup: ChatMarkup) -> None:
        self._markup = markup
        self._lock = threading.Lock()
        self._label_shapes: OrderedDict[str, None] = OrderedDict()
        self._trailer_shapes: OrderedDict[str, None] = OrderedDict()
        self._labelled: OrderedDict[tuple[int, int, str], None] = OrderedDict()
        self._decided: OrderedDict[tuple[int, int], int] = OrderedDict()

    def divide(
        self, head: str, gaps: Sequence[str], tail: str, queries: Sequence[str] = ()
    ) -> Division:
        """Divide the texts before, between and behind the contexts of one prompt.

        Parameters
        ----------
        head, tail : str
            Everything before the first and behind the last context.
        gaps : sequence of str
            What stands between them.
        queries : sequence of str
            Known query strings, which are no labels.
        """
        each = dict.fromkeys(gaps)
        short = [text for text in each if not self._is_long(text) and not _asks(text, queries)]
        forms = _forms(short)
        divided = {text: self._divide_short(head, text, tail, forms) for text in short}
        labels = [gap.label for gap in divided.values()]
        trailers = [gap.trailer for gap in divided.values()]
        _remember(self._lock, self._label_shapes, _shapes(labels, Form.STRICT))
        _remember(self._lock, self._trailer_shapes, _shapes(trailers, Form.STRICT))
        if short:
            label = self._label_length(head, labels, forms)
            trailer = self._trailer_length(tail, trailers, forms)
            self._note_labelled(head, len(head) - label)
        else:
            label = self._single_label(head)
            trailer = self._known_trailer(tail)
        return Division(label, [divided.get(g) or self._divide_long(g) for g in gaps], trailer)

    def _is_long(self, gap: str) -> bool:
        is_conversation = self._markup.has_token(gap) or bool(self._markup.turns(gap))
        return is_conversation or len(gap.strip()) > _MAX_LABEL

    def _divide_short(self, head: str, gap: str, tail: str, forms: Sequence[Form]) -> Gap:
        """Divide a gap that holds nothing but a trailer and a label."""
        if not has_words(gap):
            return Gap("", "", "")
        best, chosen = (3, 0), Gap("", "", "")
        tried = set()
        for cut in _cuts(gap):
            parts = _without_rules(gap[:cut]), _without_separators(gap[cut:])
            if parts in tried:
                continue
            tried.add(parts)
            trailer, label = parts
            seen = [
                self._trailer_length(tail, [trailer], forms) > 0,
                self._label_length(head, [label], forms) > 0,
            ]
            there = [bool(trailer), has_words(label)]
            unexplained = sum(part and not found for part, found in zip(there, seen, strict=True))
            if (unexplained, -sum(seen)) < best:
                best = unexplained, -sum(seen)
                keeps = seen[0] or has_words(trailer) or trailer.endswith(">")
                chosen = Gap(trailer if keeps else "", "", label)
            if not unexplained:
                break
        return chosen

    def _divide_long(self, gap: str) -> Gap:
        """Divide a gap that holds conversation turns or other text for the query."""
        trailer = self._known_trailer(gap)
        label = self._single_label(gap[trailer:], remember=False)
        return Gap(gap[:trailer], gap[trailer : len(gap) - label], gap[len(gap) - label :])

    def _label_length(self, head: str, labels: Sequence[str], forms: Sequence[Form]) -> int:
        """Length of the label that a text ends with, if it is shaped like one of these."""
        for form in forms:
            if length := self._match_label(head, _shapes(labels, form), form, inline=True):
                return length
        return 0

    def _trailer_length(self, tail: str, trailers: Sequence[str], forms: Sequence[Form]) -> int:
        """Length of the trailer that a text begins with, if it is shaped like one of these."""
        for form in forms:
            if length := self._match_trailer(tail, _shapes(trailers, form), form):
                return length
        return 0

    def _single_label(self, head: str, *, remember: bool = True) -> int:
        """Length of a label that no other label of the same prompt explains."""
        key = (len(head), hash(head))
        with self._lock:
            known = self._decided.get(key) if remember else None
            labelled = list(self._labelled)
            shapes = list(reversed(self._label_shapes))
        if known is not None:
            return known
        length = self._match_label(head, shapes, Form.STRICT) or self._behind_known(head, labelled)
        if not length:
            last_line = head[self._markup.boundary(head, len(head.rstrip())) :]
            length = len(last_line) if _NUMBERED.fullmatch(last_line) else 0
        if length and remember:  # the shape of a head's label may be learned yet
            _remember(self._lock, self._decided, {key: length})
        return length

    def _note_labelled(self, head: str, start: int) -> None:
        """Remember the text before a label, and the label's shape."""
        if start < len(head) and sum(map(str.isalnum, head[:start])) >= _WORTHWHILE:
            key = start, hash(head[:start]), shape(head[start:], Form.FRAMED)
            _remember(self._lock, self._labelled, {key: None})

    def _behind_known(self, head: str, labelled: Iterable[tuple[int, int, str]]) -> int:
        """Length of a label behind a text that such a label was seen behind before."""
        for start, before, wanted in labelled:
            if not 0 < len(head) - start <= _MAX_LABEL or hash(head[:start]) != before:
                continue
            if shape(head[start:], Form.FRAMED) == wanted:
                return len(head) - start
        return 0

    def _known_trailer(self, tail: str) -> int:
        with self._lock:
            shapes = list(reversed(self._trailer_shapes))
        return self._match_trailer(tail, shapes, Form.STRICT)

    def _match_label(
        self, head: str, shapes: Iterable[str], form: Form, *, inline: bool = False
    ) -> int:
        breaks = [match.end() for match in BREAK.finditer(head, max(0, len(head) - _SEARCHED))]
        for wanted in shapes:
            lines = wanted.count("\n") + 1
            if len(breaks) < lines and len(head) > _SEARCHED:
                continue
            start = breaks[-lines] if len(breaks) >= lines else 0
            start += max(self._markup.token_ends(head[start:]), default=0)
            position = label_start(head, wanted, form, start, inline)
            if position is not None:
                return len(head) - position
        return 0

    def _match_trailer(self, tail: str, shapes: Iterable[str], form: Form) -> int:
        tail = tail[: self._markup.first_token(tail[:_SEARCHED])]
        ends = (trailer_end(tail, wanted, form) for wanted in shapes)
        return next((end for end in ends if end), 0)


def _cuts(gap: str) -> Iterator[int]:
    """Yield where a gap may be divided, the likeliest place first."""
    low, high = _record_boundary(gap)
    zone = gap[low:high]
    ends = [match.end() for match in BREAK.finditer(zone)]
    if not ends:
        return iter((low, high) if has_words(zone) else (low,))
    # An empty line ends a document.
    for end in ends[:-1]:
        if BREAK.match(zone, end) and has_words(zone[:end]) and has_words(gap[low + end :]):
            ends.insert(0, end)
            break
    return (low + end for end in ends)


def _record_boundary(gap: str) -> tuple[int, int]:
    """Return the part of a gap in which neither a bracket nor a tag of a document is open."""
    depth = deepest = low = 0
    opened: int | None = None
    for match in _NESTED.finditer(gap):
        if match["empty"]:
            continue
        if match["closes"] or match["end"]:
            depth -= 1
            if depth < deepest:
                deepest, low = depth, match.end()
            if depth == deepest:
                opened = None
        else:
            if depth == deepest:
                opened = match.start()
            depth += 1
    return low, len(gap) if opened is None else opened


def _forms(gaps: Iterable[str]) -> tuple[Form, ...]:
    """Return the forms in which shapes are compared: names of fields that vary are values."""
    by_lines: dict[int, set[str]] = {}
    for gap in gaps:
        named = shape(gap)
        by_lines.setdefault(named.count("\n"), set()).add(named)
    varied = any(len(shapes) > 1 for shapes in by_lines.values())
    return tuple(Form) if varied else (Form.STRICT, Form.FRAMED)


def _asks(gap: str, queries: Sequence[str]) -> bool:
    return _QUESTION.search(gap) is not None or any(q in gap for q in queries if is_telling(q))


def _shapes(texts: Iterable[str], form: Form) -> dict[str, None]:
    return dict.fromkeys(shape(text, form) for text in texts if text)


def _remember(lock: threading.Lock, memory: OrderedDict[Any, Any], news: dict[Any, Any]) -> None:
    with lock:
        for key, value in news.items():
            memory[key] = value
            memory.move_to_end(key)
        while len(memory) > _REMEMBERED:
            memory.popitem(last=False)


def _without_separators(text: str) -> str:
    """Drop leading lines without a letter or digit, and what separates records."""
    while (line := BREAK.search(text)) and not has_words(text[: line.start()]):
        text = text[line.end() :]
    return text.lstrip(" \t\"'),}]")


def _without_rules(text: str) -> str:
    """Drop trailing lines without a letter or digit, unless they close what is open."""
    while True:
        text = text.rstrip()
        breaks = list(BREAK.finditer(text))
        if not breaks:
            return text.rstrip(" \t,") if has_words(text) or re.search(r"[}\])>]", text) else ""
        last = text[breaks[-1].end() :]
        if has_words(last) or re.fullmatch(r"[\s\"'}\])>,]*[}\])>][\s,]*", last):
            return text.rstrip(" \t,")
        text = text[: breaks[-1].start()]
