"""Conversations, rewritten as far as a chat template needs it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ape_integrations.core.guard import guarded
from ape_integrations.errors import ConfigError

Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "function": "tool",
}
_OPENING = "(The conversation begins with the assistant.)"


@dataclass(frozen=True)
class Abilities:
    """What a template renders as it is; the defaults are those of the plainest template."""

    system: bool = False  # a system message before the first user message
    late_system: bool = False  # a system message anywhere else
    repeats: bool = False  # the same role twice in a row
    opening: bool = False  # a conversation that the assistant begins
    tool_role: bool = False  # tool calls and tool messages
    tools: bool = False  # a list of tools


def checked(message: Mapping[str, Any]) -> Message:
    """Bring a message to the form that templates read.

    Raises
    ------
    ConfigError
        Unknown role, or content other than text.
    """
    role = _ROLES.get(str(message.get("role", "")).lower())
    if role is None:
        raise ConfigError(
            f"Unknown message role {message.get('role')!r}: use system, user, assistant or tool."
        )
    plain = {**message, "role": role, "content": _text(message.get("content"))}
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_checked_call(call) for call in plain["tool_calls"]]
    return plain


def _checked_call(call: Mapping[str, Any]) -> Message:
    """Bring a tool call to the form that templates read, with its arguments as a mapping."""
    function = dict(call.get("function") or {"name": call.get("name")})
    arguments = function.get("arguments", call.get("args", {}))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # what is no JSON stays a string
            arguments = json.loads(arguments)
    function["arguments"] = arguments
    return {"id": call.get("id") or "", "type": "function", "function": function}


def guard(value: Any, specials: tuple[str, ...]) -> Any:
    """Guard every string of a message, so that templates write no special token but their own."""
    if isinstance(value, str):
        return guarded(value, specials)
    if isinstance(value, Mapping):
        return {key: guard(item, specials) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [guard(item, specials) for item in value]
    return value


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [part if isinstance(part, str) else _part_text(part) for part in content]
        return "\n".join(parts)
    raise ConfigError(f"Message content must be text, not {type(content).__name__}.")


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ConfigError(f"Message content of type {kind!r} is not supported: pass text only.")


def adapt(chat: Sequence[Message], can: Abilities) -> list[Message]:
    """Rewrite a conversation so that a template with these abilities renders all of it."""
    adapted = list(chat) if can.tool_role else [without_tools(message) for message in chat]
    if not can.late_system or not can.system:
        adapted = _place_system(adapted, can.system)
    if not can.repeats:
        adapted = _merge_repeats(adapted)
    if not can.opening:
        first = next((i for i, m in enumerate(adapted) if m["role"] != "system"), len(adapted))
        if first < len(adapted) and adapted[first]["role"] == "assistant":
            adapted.insert(first, {"role": "user", "content": _OPENING})
    return adapted


def without_tools(message: Message) -> Message:
    """Write tool calls and tool results as text."""
    if message["role"] == "tool":
        name = message.get("name")
        title = f"Result of the tool {name}:" if name else "Result of the tool:"
        return {"role": "user", "content": f"{title}\n{message['content']}"}
    if not message.get("tool_calls"):
        return message
    lines = [message["content"]] if message["content"] else []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        lines.append(f"Call of the tool {call['function']['name']} with {arguments}")
    return {"role": message["role"], "content": "\n".join(lines)}


def _place_system(chat: Sequence[Message], has_role: bool) -> list[Message]:
    """Merge the leading system messages; make later ones, or all, part of user messages."""
    placed: list[Message] = []
    pending: list[str] = []
    leading = True
    for message in chat:
        if message["role"] == "system":
            pending.append(message["content"])
            continue
        if leading and pending and has_role:
            placed.append({"role": "system", "content": "\n\n".join(pending)})
            pending = []
        leading = False
        if pending and message["role"] == "user":
            message = {**message, "content": "\n\n".join([*pending, message["content"]])}
        elif pending:
            placed.append({"role": "user", "content": "\n\n".join(pending)})
        pending = []
        placed.append(message)
    if pending:
        role = "system" if leading and has_role else "user"
        placed.append({"role": role, "content": "\n\n".join(pending)})
    return placed


def _merge_repeats(chat: Sequence[Message]) -> list[Message]:
    """Join neighbours of one role; tool messages and tool calls stay apart."""
    merged: list[Message] = []
    for message in chat:
        last = merged[-1] if merged else None
        joins = (
            last is not None
            and last["role"] == message["role"] != "tool"
            and not last.get("tool_calls")
            and not message.get("tool_calls")
        )
        if last is not None and joins:
            contents = [text for text in (last["content"], message["content"]) if text]
            merged[-1] = {**last, "content": "\n\n".join(contents)}
        else:
            merged.append(message)
    return merged


def with_short_ids(message: Message) -> Message:
    """Give tool calls identifiers of nine letters and digits: some templates accept no others."""
    changed = dict(message)
    if message.get("tool_call_id"):
        changed["tool_call_id"] = _short_id(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "id": _short_id(call["id"])} for call in message["tool_calls"]
        ]
    return changed


def _short_id(identifier: object) -> str:
    return hashlib.sha256(str(identifier).encode()).hexdigest()[:9]
