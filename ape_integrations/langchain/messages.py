"""LangChain messages <-> the messages that chat templates render."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.documents import Document
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
_NOT_REPEATED = frozenset({"tool_call", "tool_use", "tool_call_chunk", "reasoning", "thinking"})


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
    return list(_texts(message.content, repeated=not isinstance(message, AIMessage)))


def _texts(blocks: Sequence[Any], *, repeated: bool) -> Iterator[str]:
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else "text"
        if isinstance(block, str):
            yield block
        elif isinstance(block, dict) and isinstance(block.get("text"), str):
            yield block["text"]
        elif repeated or kind not in _NOT_REPEATED:
            raise ConfigError(
                f"A message holds content of type {kind!r}, but the model reads text only. "
                "Leave it out, or describe it in words."
            )


def documents_in(messages: Sequence[BaseMessage]) -> list[str]:
    """Return the texts of documents that tools handed over besides their answer.

    Retrieval tools of the kind ``content_and_artifact`` put the documents there; a conversation
    that was stored and loaded again still has them.
    """
    return [
        document.page_content
        for message in messages
        if isinstance(message, ToolMessage) and isinstance(message.artifact, (list, tuple))
        for document in message.artifact
        if isinstance(document, Document)
    ]
