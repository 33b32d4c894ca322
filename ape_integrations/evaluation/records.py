"""Questions and few-shot tasks from JSON Lines files, in the shapes that data sets come in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ape_integrations.errors import ConfigError

_QUESTION = ("question", "input", "query")
_CONTEXTS = ("contexts", "context", "documents", "passages", "paragraphs", "ctxs")
_ANSWERS = ("answers", "answer", "outputs", "output", "target")
_TEXT = ("text", "page_content", "content", "paragraph_text", "passage", "body")

#: Where one string holds several contexts, as LongBench's do.
DEFAULT_SPLIT = r"(?m)^(?=Passage \d+:)"
DEFAULT_EXAMPLE = "Question: {input}\nAnswer: {output}"

_TOO_DEEP = (
    "lists and objects stand too deep inside each other. Write {question, contexts, answers}."
)


@dataclass(frozen=True)
class Record:
    """One task to answer.

    Parameters
    ----------
    question : str
        The question, or the input to answer as the examples do.
    contexts : tuple of str
        Texts to read, or one text per example.
    answers : tuple of str
        Accepted answers.
    few_shot : bool
        Whether the contexts are examples.
    """

    question: str
    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    few_shot: bool


def read_records(
    path: Path,
    *,
    limit: int | None = None,
    split: str = DEFAULT_SPLIT,
    example: str = DEFAULT_EXAMPLE,
) -> list[Record]:
    """Read tasks from a file of JSON objects, one a line (or one array of them).

    Parameters
    ----------
    path : Path
        Objects ``{"question", "contexts", "answers"}`` or ``{"examples", "input", "answers"}``.
        Fields may be strings or lists; common other names and shapes (HotpotQA, LongBench, SQuAD,
        TriviaQA, MuSiQue, DPR) are understood, and further fields are left alone.
    limit : int, optional
        Read so many at most, from the start.
    split : str
        Regular expression at which contexts given as one string are cut.
    example : str
        Text of an example that has an ``{input}`` and an ``{output}``.

    Returns
    -------
    list of Record
        In the order of the file.

    Raises
    ------
    ConfigError
        The file cannot be read or holds no record, or a line is wrong, which the message names.
    """
    if "{input}" not in example or "{output}" not in example:
        raise ConfigError("The form of an example needs {input} and {output}.")
    records: list[Record] = []
    for number, value in _objects(path):
        if limit is not None and len(records) == limit:
            break
        try:
            records.append(_record(value, split, example))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        except RecursionError:
            raise ConfigError(f"{path}, line {number}: {_TOO_DEEP}") from None
    if not records:
        raise ConfigError(f"{path} holds no record: write one JSON object a line.")
    return records


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield values with their line, or with their place in the array."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error
    if text.lstrip().startswith("["):
        yield from enumerate(_parsed(text, path, 1), 1)
        return
    # Not splitlines(): JSON strings may hold other line separators than this one.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parsed(line, path, number)


def _parsed(text: str, path: Path, first: int) -> Any:
    """Return the value that a text stands for, which begins at some line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raise ConfigError(f"{path}, line {line}: not JSON: {error.msg}.") from error
    except RecursionError:
        raise ConfigError(f"{path}, line {first}: {_TOO_DEEP}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{path}, line {first}: cannot be read: {error}.") from error


def _record(value: Any, split: str, example: str) -> Record:
    if not isinstance(value, Mapping):
        raise ConfigError(f"an object is needed, not {_kind(value)}.")
    few_shot = "examples" in value
    if few_shot:
        contexts = [_example(each, example) for each in _listed(value["examples"])]
    else:
        contexts = _contexts(_field(value, _CONTEXTS), split)
    contexts = [text for text in (text.strip() for text in contexts) if text]
    if not contexts:
        raise ConfigError("there is no context: contexts (or examples) must hold some text.")
    question = _field(value, ("input", "question", "query") if few_shot else _QUESTION)
    if not isinstance(question, str):
        raise ConfigError(f"the question must be a string, not {_kind(question)}.")
    answers = _answers(_field(value, _ANSWERS))
    if not any(answer.strip() for answer in answers):
        raise ConfigError("there is no answer: answers must hold at least one.")
    return Record(question, tuple(contexts), tuple(answers), few_shot)


def _field(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if value.get(name) is not None:
            return value[name]
    raise ConfigError(f"the field {names[0]!r} is missing; there is {', '.join(value) or 'none'}.")


def _contexts(value: Any, split: str) -> list[str]:
    if isinstance(value, str):
        return re.split(split, value)
    if isinstance(value, Mapping):
        columns = [column for column in value.values() if isinstance(column, list)]
        if len(columns) == len(value) == 2:  # HotpotQA: all titles, all lists of sentences
            if len(columns[0]) != len(columns[1]):
                raise ConfigError(
                    f"{' and '.join(value)} must be as many as each other, not "
                    f"{len(columns[0])} and {len(columns[1])}."
                )
            return [_text(list(pair)) for pair in zip(*columns, strict=True)]
        return [_text(value)]
    return [_text(each) for each in _listed(value)]


def _text(value: Any) -> str:
    """Return a context's text, its title in front."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        title, body = value
    elif isinstance(value, Mapping):
        title, body = value.get("title") or "", _field(value, _TEXT)
    else:
        raise ConfigError(f"a context must be a string or hold a text, not {_kind(value)}.")
    if isinstance(body, list):
        body = "".join(map(str, body))
    return f"{title}\n{body}" if title else str(body)


def _example(value: Any, form: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 2:
        given, output = value
    elif isinstance(value, Mapping):
        given, output = _field(value, ("input", "question", "query")), _field(value, _ANSWERS)
    else:
        raise ConfigError(f"an example must be a string, a pair or an object, not {_kind(value)}.")
    outputs = _answers(output)
    if not outputs:
        raise ConfigError("the output of an example must hold a text, not an empty list.")
    # One pass: an input may itself hold "{output}".
    parts = {"{input}": str(given), "{output}": outputs[0]}
    return re.sub(r"\{input\}|\{output\}", lambda found: parts[found[0]], form)


def _answers(value: Any) -> list[str]:
    if isinstance(value, Mapping):  # SQuAD, TriviaQA
        named = [value[name] for name in ("text", "value", "aliases") if name in value]
        found = [text for each in named for text in _answers(each)]
        if not found:
            raise ConfigError("answers holds neither text, value nor aliases.")
        return found
    if isinstance(value, list):
        return [text for each in value for text in _answers(each)]
    if isinstance(value, (str, int, float)):
        return [str(value)]
    raise ConfigError(f"an answer must be a string or a number, not {_kind(value)}.")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a bool"}
    return names.get(type(value), "a number")
