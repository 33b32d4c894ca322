"""Chat messages of LlamaIndex -> a rendered prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from ape_integrations.core.chat import render_chat
from ape_integrations.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM = (MessageRole.SYSTEM, MessageRole.DEVELOPER)


def message_text(message: ChatMessage) -> str:
    """Return a message's text, one block a line, as ``ChatMessage.content`` joins blocks.

    Raises
    ------
    ConfigError
        A block is no text: an image, audio, video or document.
    """
    return "\n".join(_texts(message.blocks, message.role.value))


def _texts(blocks: Iterable[Any], role: str) -> list[str]:
    texts: list[str] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, CitableBlock):
            texts.extend(_texts(block.content, role))
        elif not isinstance(block, (CachePoint, ThinkingBlock, ToolCallBlock)):
            # A cache point holds nothing, thoughts are not shown again, calls are no text.
            kind = getattr(block, "block_type", type(block).__name__)
            raise ConfigError(
                f"A {role} message holds a block of type {kind!r}, and APELLM reads text only. "
                "Turn it into a TextBlock, or use a multimodal LLM."
            )
    return texts


def with_system_prompt(
    messages: Sequence[ChatMessage], system_prompt: str | None
) -> list[ChatMessage]:
    """Return a conversation with exactly one leading system message, if there is any.

    Parameters
    ----------
    messages : sequence of ChatMessage
        The conversation. Its leading system messages become one, with a blank line between.
    system_prompt : str, optional
        Put first, unless the conversation starts with it as lines of its own already
        (``LLM.predict`` adds it).
    """
    leading = 0
    while leading < len(messages) and messages[leading].role in _SYSTEM:
        leading += 1
    texts = [message_text(message) for message in messages[:leading]]
    if system_prompt and not (texts and f"{texts[0]}\n".startswith(f"{system_prompt}\n")):
        texts.insert(0, system_prompt)
    texts = [text for text in texts if text.strip()]
    system = [ChatMessage(role=MessageRole.SYSTEM, content="\n\n".join(texts))] if texts else []
    return [*system, *messages[leading:]]


class TemplateRenderer:
    """Turns messages into a prompt by the tokenizer's chat template.

    Parameters
    ----------
    tokenizer : callable
        Returns the tokenizer, when it is needed.
    """

    def __init__(self, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._tokenizer = tokenizer

    def __call__(self, messages: Sequence[ChatMessage]) -> str:
        """Render messages, with the header of the answer at the end."""
        return render_chat(self._tokenizer(), [_plain(message) for message in messages])


def _plain(message: ChatMessage) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role.value, "content": message_text(message)}
    calls = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    if calls:
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    for name in ("name", "tool_call_id"):
        if value := message.additional_kwargs.get(name):
            plain[name] = value
    return plain


def _plain_call(call: ToolCallBlock) -> dict[str, Any]:
    function = {"name": call.tool_name, "arguments": call.tool_kwargs}
    return {"id": call.tool_call_id or "", "type": "function", "function": function}
