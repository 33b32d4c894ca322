"""Results of a generation as responses of LlamaIndex."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    MessageRole,
)

from ape_integrations.core.asynchronous import Pieces
from ape_integrations.llama_index.arguments import clear_argument_errors

if TYPE_CHECKING:
    from ape_integrations.core.generation import GenerationResult, GenerationStream

R = TypeVar("R", ChatResponse, CompletionResponse)


def completion(result: GenerationResult, delta: str | None = None) -> CompletionResponse:
    """Return the response of a finished completion."""
    return CompletionResponse(text=result.text, delta=delta, raw=_raw(result))


def completion_piece(text: str, delta: str) -> CompletionResponse:
    """Return the response of a completion that goes on."""
    return CompletionResponse(text=text, delta=delta)


def chat_answer(result: GenerationResult, delta: str | None = None) -> ChatResponse:
    """Return the response of a finished answer."""
    return ChatResponse(message=_message(result.text), delta=delta, raw=_raw(result))


def chat_piece(text: str, delta: str) -> ChatResponse:
    """Return the response of an answer that goes on."""
    return ChatResponse(message=_message(text), delta=delta)


def read(
    stream: GenerationStream, piece: Callable[[str, str], R], end: Callable[..., R]
) -> Generator[R, None, None]:
    """Yield a response per piece of text, and one with the figures and no new text at the end."""
    text = ""
    try:
        while (delta := _next(stream)) is not None:
            text += delta
            yield piece(text, delta)
        yield end(stream.result, "")
    finally:
        stream.close()


async def aread(
    stream: GenerationStream, piece: Callable[[str, str], R], end: Callable[..., R]
) -> AsyncGenerator[R, None]:
    """As `read`, without blocking the event loop."""
    text = ""
    async with aclosing(Pieces(stream)) as deltas:
        while (delta := await _anext(deltas)) is not None:
            text += delta
            yield piece(text, delta)
    yield end(stream.result, "")


def _next(stream: GenerationStream) -> str | None:
    with clear_argument_errors():
        return next(stream, None)


async def _anext(deltas: AsyncIterator[str]) -> str | None:
    with clear_argument_errors():
        return await anext(deltas, None)


def _message(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.ASSISTANT, content=text)


def _raw(result: GenerationResult) -> dict[str, Any]:
    return {
        "usage": dict(result.usage),
        "finish_reason": result.finish_reason,
        "ape": result.report(),
    }
