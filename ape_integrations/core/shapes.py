"""The form of a label or trailer: what stays when the values in it change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache

#: Line breaks, also those of JSON strings.
BREAK = re.compile(r"\n|\\n")

_FIELD = re.compile(r"([^\s:\uff1a<][^:\uff1a\n<]{0,39})[:\uff1a]")
# Names of fields inside a line: "file": of JSON and Python, metadata= of a repr.
_KEY = re.compile(r"[\"']([\w .-]{1,40})[\"'] ?:|\b([a-z_]\w{0,39})=(?=[\"'{\[(])")
_TAG = re.compile(r"</?[A-Za-z][\w:.-]*")
_VALUE = re.compile(r"[./\\\d]")  # in what looks like a field's name, but is a file's
_LEAD = re.compile(r"[\W_]*")
_CLOSE = re.compile(r"[\s\"'`}\])>|:=,*\u3011\uff09\u2013\u2014-]*\Z")
_PAIRS = {"(": ")", "[": "]", "\u3010": "\u3011", "\uff08": "\uff09"}
_CLOSERS = "".join(_PAIRS.values()) + "}>|"
_SPACE = re.compile(r"\s+")
_ESCAPED = re.compile(r"\\[nrt]")

_OPENING = " \t\"'[{"
# Characters behind which a label may begin inside a line.
_BEFORE_LABEL = " \t:\uff1a>[{(\"'|"
_BEFORE_FRAME = ":\uff1a>[{(\"'"


class Form(Enum):
    """How much of a text its shape keeps."""

    STRICT = "names of fields, keys and tags, and all of a line without any"
    FRAMED = "of a line without any, and of a name that is a file's, the punctuation around it"
    FREE = "of all names of fields as well"


def has_words(text: str) -> bool:
    """Whether a text holds a letter or digit; escaped line breaks of JSON strings do not count."""
    return any(map(str.isalnum, _ESCAPED.sub("", text)))


def shape(text: str, form: Form = Form.STRICT) -> str:
    """Return what stays of a label when its numbers and values change.

    A line with a field name keeps the name, a record its keys, markup its tags; digits become
    ``#``.
    """
    return "\n".join(_shape_of_line(line.strip(), form) for line in BREAK.split(text))


@lru_cache(4096)
def _shape_of_line(line: str, form: Form) -> str:
    if keys := list(_KEY.finditer(line)):
        names = ",".join(match[1] or match[2] for match in keys)
        return _squeezed(line[: keys[0].start()], f"{{{names}}}", _CLOSE.search(line))
    if tags := _TAG.findall(line):
        return "".join(tags)
    closer = _PAIRS.get(line[:1])
    if closer and line.endswith(closer):
        return f"{line[0]}{_shape_of_line(line[1:-1].strip(), form)}{closer}"
    if field := _FIELD.match(line):
        name = field.group(1)
        if form is Form.FREE or (form is Form.FRAMED and _VALUE.search(name)):
            return "\u2026:"
        return _unnumbered(name) + ":"
    if not has_words(line):
        return line.replace('"', "'")
    if form is Form.STRICT:
        return _unnumbered(line)
    lead = _LEAD.match(line)
    return _squeezed(lead.group() if lead else "", "\u2026", _CLOSE.search(line))


def _squeezed(lead: str, core: str, close: re.Match[str] | None) -> str:
    # Python chooses the quotes by what stands between them.
    whole = f"{_unnumbered(lead)}{core}{close.group() if close else ''}"
    return _SPACE.sub("", whole).replace('"', "'")


def _unnumbered(text: str) -> str:
    return re.sub(r"\d+|\b[A-Z]\b", "#", text)


def label_start(head: str, wanted: str, form: Form, start: int, inline: bool) -> int | None:
    """Return where a label of a shape begins in the lines that a text ends with; None if nowhere.

    Parameters
    ----------
    head : str
    wanted : str
        Shape of the label.
    form : Form
        That of the shape.
    start : int
        Where the line or message begins in which the label begins.
    inline : bool
        Whether other words may stand before it in that line, up to punctuation or markup.
    """
    first, *rest = BREAK.split(head[start:])
    wanted_first, _, wanted_rest = wanted.partition("\n")
    if rest and shape("\n".join(rest), form) != wanted_rest:
        return None
    for position, char in enumerate(first):
        before = first[:position]
        opens = not before.strip(_OPENING)
        if not opens and inline:
            near = before[-1:] if form is Form.STRICT else before.rstrip(" \t")[-1:]
            opens = near in (_BEFORE_LABEL if form is Form.STRICT else _BEFORE_FRAME)
        if not opens or char.isspace():
            continue
        if _shape_of_line(first[position:].strip(), form) == wanted_first:
            return start + position
    return None


def trailer_end(tail: str, wanted: str, form: Form) -> int | None:
    """Return where a trailer of a shape ends in the text behind a context; None if there is none.

    Parameters
    ----------
    tail : str
    wanted : str
        Shape of the trailer.
    form : Form
        That of the shape.
    """
    *before, last = wanted.split("\n")
    breaks = [(match.start(), match.end()) for match in BREAK.finditer(tail)]
    if len(breaks) < len(before):
        return None
    start = breaks[len(before) - 1][1] if before else 0
    if before and shape(tail[: breaks[len(before) - 1][0]], form) != "\n".join(before):
        return None
    end = breaks[len(before)][0] if len(breaks) > len(before) else len(tail)
    line = tail[start:end]
    ends: Sequence[int] = [len(line.rstrip())]
    if last[-1:] in _CLOSERS or _TAG.match(last):
        ends = [i + 1 for i, char in enumerate(line) if char in _CLOSERS]
    closer = _PAIRS.get(last[:1], "")
    for position in ends:
        part = line[:position].strip()
        is_whole = not closer or part.count(last[0]) == part.count(closer)
        if is_whole and _shape_of_line(part, form) == last:
            return start + position
    return None
