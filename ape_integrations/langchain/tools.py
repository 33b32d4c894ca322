"""Tool calls in generated text: how a template's model writes them, and reading them again."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import InvalidToolCall, ToolCall
from langchain_core.messages.tool import invalid_tool_call, tool_call

_DECODER = json.JSONDecoder(strict=False)
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")
_FENCE = re.compile(r"\A\s*```(?:json)?\s*(.*?)\s*(?:```\s*)?\Z", re.DOTALL)
_BETWEEN = re.compile(r"[\s;,]*")
_PYTHON_TAG = "<|python_tag|>"
_FIRST_KEYS = ('"name"', '"type"', '"id"', '"function"', '"parameters"', '"arguments"')
_THOUGHT, _THOUGHT_END = "<think>", "</think>"


@dataclass(frozen=True)
class ToolFormat:
    """How the models of a template family begin a tool call.

    Parameters
    ----------
    opening : str
        Text before the JSON of the first call.
    arguments : str
        Name of the field with the arguments.
    """

    opening: str
    arguments: str

    def forced_opening(self, name: str | None) -> str:
        """Return the text with which an answer must begin so that it is a call.

        Parameters
        ----------
        name : str or None
            The tool to call; None leaves the choice to the model.
        """
        if name is None:
            return f'{self.opening}{{"name": "'
        return f'{self.opening}{{"name": {json.dumps(name)}, "{self.arguments}":'


_HERMES = ToolFormat("<tool_call>\n", "arguments")
_MISTRAL_LIST = ToolFormat(f"{_MISTRAL}[", "arguments")
_BARE = ToolFormat("", "parameters")
_BARE_ARGUMENTS = ToolFormat("", "arguments")


def tool_format(template: str) -> ToolFormat:
    """Return how the models of a chat template write tool calls."""
    if "<tool_call>" in template:
        return _HERMES
    if _MISTRAL in template:
        return _MISTRAL_LIST
    return _BARE if '"parameters"' in template else _BARE_ARGUMENTS


@dataclass
class ToolCalls:
    """What an answer holds.

    Parameters
    ----------
    text : str
        The answer without its tool calls.
    calls : list of ToolCall
        Calls that could be read.
    invalid : list of InvalidToolCall
        Calls that were begun but cannot be read, for example because the answer was cut. Their
        ``args`` are what was written, the mark of a call included.
    """

    text: str
    calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidToolCall] = field(default_factory=list)


def after_thoughts(text: str) -> tuple[str, str]:
    """Divide an answer behind the thoughts of a reasoning model, if it begins with some.

    The template may have opened them, so that the answer only ends them; an answer that was cut
    while the model was thinking consists of thoughts.
    """
    end = text.rfind(_THOUGHT_END)
    if end >= 0:
        end += len(_THOUGHT_END)
        return text[:end], text[end:]
    return (text, "") if text.lstrip().startswith(_THOUGHT) else ("", text)


def parse_tool_calls(text: str, names: Sequence[str]) -> ToolCalls:
    """Read the tool calls in an answer.

    Known are JSON objects between ``<tool_call>`` tags, after ``[TOOL_CALLS]``, or, where an answer
    consists of nothing else, bare.

    Parameters
    ----------
    text : str
        The answer, with special tokens.
    names : sequence of str
        The tools; bare JSON that names none of them is an answer like any other.
    """
    thoughts, answer = after_thoughts(text)
    if thoughts:
        found = parse_tool_calls(answer, names)
        found.text = thoughts + found.text
        return found
    if "<tool_call>" in text:
        found = ToolCalls(text[: text.index("<tool_call>")].rstrip())
        for match in _TAGGED.finditer(text):
            _add(list(_json_values(match.group(1))), match.group().strip(), found)
        return found
    if _MISTRAL in text:
        before, *parts = text.split(_MISTRAL)
        found = ToolCalls(before.rstrip())
        for part in parts:
            named = _MISTRAL_NAMED.match(part)
            values = list(_json_values(part[named.end() :] if named else part))
            if named:
                values = [{"name": named[1], "arguments": value} for value in values[:1]]
            _add(values, f"{_MISTRAL}{part}", found)
        return found
    bare = text.replace(_PYTHON_TAG, "").strip()
    fence = _FENCE.match(bare)
    bare = fence[1] if fence else bare
    if bare.startswith(("{", "[")):
        found = ToolCalls("")
        _add(list(_json_values(bare)), bare if bare.startswith("[") else f"[{bare}]", found)
        if found.calls and all(call["name"] in names for call in found.calls):
            return found
    return ToolCalls(text)


def _add(values: Sequence[Any], text: str, found: ToolCalls) -> None:
    """Add the calls that were read from a text; what is none of them makes the text invalid.

    The text must not begin as an object does: LangChain reads the arguments of streamed calls
    once more, and completes such a text to the arguments of a valid call.
    """
    calls = [_call(value) for value in values]
    good = [call for call in calls if call is not None]
    found.calls += good
    if not values or len(good) < len(calls):
        found.invalid.append(invalid_tool_call(name=None, args=text, id=_new_id(), error=None))


def _json_values(text: str) -> Iterator[Any]:
    """Yield JSON values that follow each other, split up where they are lists."""
    position = 0
    while True:
        between = _BETWEEN.match(text, position)
        try:
            value, position = _DECODER.raw_decode(text, between.end() if between else position)
        except json.JSONDecodeError:
            return
        yield from value if isinstance(value, list) else [value]


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return None
    if not isinstance(arguments, dict):
        return None
    return tool_call(name=value["name"], args=arguments, id=_new_id())


def _new_id() -> str:
    # Nine letters and digits: some templates accept no other identifiers.
    return uuid.uuid4().hex[:9]


class ToolCallFilter:
    """Lets the text of a streamed answer through up to where a tool call begins.

    Parameters
    ----------
    form : ToolFormat
        How the model begins a call.
    """

    def __init__(self, form: ToolFormat) -> None:
        # Pieces of text come without special tokens, so a call may show by its JSON alone.
        self._markers = [m for m in (form.opening.strip(), '{"name"', '[{"name"') if m]
        self._held = ""
        self._shown = False

    def push(self, piece: str) -> str:
        """Return the text that is certainly not part of a call."""
        self._held += piece
        if not self._shown and _may_be_call(self._held.lstrip()):
            return ""
        cut = self._cut()
        shown, self._held = self._held[:cut], self._held[cut:]
        self._shown = self._shown or bool(shown)
        return shown

    def _cut(self) -> int:
        """Return where a call begins, or may begin once more text is there."""
        found = [at for marker in self._markers if (at := self._held.find(marker)) >= 0]
        if found:
            return min(found)
        for at in range(max(0, len(self._held) - max(map(len, self._markers))), len(self._held)):
            if any(marker.startswith(self._held[at:]) for marker in self._markers):
                return at
        return len(self._held)


def _may_be_call(answer: str) -> bool:
    """Whether an answer that begins like this may consist of calls alone."""
    rest = answer
    for optional in ("```", "json", "[", "{"):
        if optional.startswith(rest):
            return True  # too short to tell, or no more than the beginning of a call
        found = rest.startswith(optional)
        if optional == "{" and not found:
            return False
        rest = rest[len(optional) :].lstrip() if found else rest
    return not rest or any(key.startswith(rest[: len(key)]) for key in _FIRST_KEYS)
