"""LangChain messages <-> the messages that chat templates render."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from ape_integrations.errors import ConfigError

#: Parts of a model's own message that are no text to repeat: calls stand in ``tool_calls``.
_NOT_REPEATED = frozenset(
    {
        *("tool_call", "tool_use", "tool_call_chunk", "reasoning", "thinking"),
        *("server_tool_call", "server_tool_call_chunk", "server_tool_result"),
    }
)

#: Blocks that are text and nothing else, and what may stand beside the text of any block.
_TEXT = frozenset({"text", "text-plain", "input_text", "output_text"})
_BESIDE_TEXT = frozenset({"type", "text", "id", "index", "annotations", "extras", "cache_control"})

#: Fields that say where what is no text is to be had.
_MEDIA = frozenset(
    {"base64", "data", "url", "image_url", "input_audio", "file_id", "source", "file"}
)


def to_template_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them.

    Raises
    ------
    ConfigError
        A message holds something other than text, or is of an unknown kind.
    """
    return [_to_template_message(message) for message in messages]


def _to_template_message(message: BaseMessage) -> dict[str, Any]:
    if isinstance(message, ToolMessage):
        return _named(message, "tool", tool_call_id=message.tool_call_id)
    if isinstance(message, FunctionMessage):
        return _named(message, "tool")
    if isinstance(message, AIMessage):
        calls = [
            {
                "id": call["id"] or "",
                "type": "function",
                "function": {"name": call["name"], "arguments": call["args"]},
            }
            for call in message.tool_calls
        ]
        return _named(message, "assistant", **({"tool_calls": calls} if calls else {}))
    if isinstance(message, SystemMessage):
        return _named(message, "system")
    if isinstance(message, HumanMessage):
        return _named(message, "user")
    if isinstance(message, ChatMessage):
        return _named(message, message.role)
    raise ConfigError(f"A {type(message).__name__} cannot be part of a prompt.")


def _named(message: BaseMessage, role: str, **more: Any) -> dict[str, Any]:
    named = {"name": message.name} if message.name else {}
    return {"role": role, "content": _content(message), **named, **more}


def _content(message: BaseMessage) -> str | list[str]:
    if isinstance(message.content, str):
        return message.content
    return list(_texts(message))


def _texts(message: BaseMessage) -> Iterator[str]:
    for block in message.content:
        if isinstance(block, str):
            yield block
            continue
        kind, text = block.get("type"), block.get("text")
        if isinstance(text, str) and (kind in _TEXT or not block.keys() - _BESIDE_TEXT):
            yield text
        elif isinstance(message, AIMessage) and kind in _NOT_REPEATED:
            continue
        elif isinstance(text, str) or (
            isinstance(message, ToolMessage) and not _MEDIA & block.keys()
        ):
            # A record that a tool returned: its other fields are part of what it says.
            yield json.dumps(block, ensure_ascii=False, default=str)
        else:
            raise ConfigError(
                f"A message holds content of type {kind!r}, but the model reads text only. "
                "Leave it out, or describe it in words."
            )
