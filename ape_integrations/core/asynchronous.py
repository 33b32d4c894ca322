"""Generation without blocking the event loop; a cancelled task stops generating."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from contextvars import copy_context
from typing import Any, TypeVar

from transformers import StoppingCriteria

from ape_integrations.core.generation import Cancellation, GenerationStream
from ape_integrations.core.threads import PassingExecutor, release_openmp_team

T = TypeVar("T")

_END = object()

# Threads of our own: the loop's default executor is small, and long answers would keep everybody
# else who needs it waiting, retrievers among them.
_workers = PassingExecutor(32, "ape-generate")


def stopped_by(generation_kwargs: dict[str, Any], *criteria: StoppingCriteria) -> dict[str, Any]:
    """Return arguments for the generator with more stopping criteria."""
    if not criteria:
        return generation_kwargs
    given = generation_kwargs.get("stopping_criteria") or []
    return {**generation_kwargs, "stopping_criteria": [*given, *criteria]}


async def run_generation(generate: Callable[[StoppingCriteria], T]) -> T:
    """Generate in a worker thread.

    Parameters
    ----------
    generate : callable
        Is given a stopping criterion, with which cancelling the task stops the generation after
        the current token.
    """
    cancellation = Cancellation()
    release_openmp_team()
    loop, context = asyncio.get_running_loop(), copy_context()
    try:
        return await loop.run_in_executor(_workers, context.run, generate, cancellation)
    except asyncio.CancelledError:
        cancellation.requested.set()
        raise


async def iterate(stream: GenerationStream) -> AsyncGenerator[str, None]:
    """Yield the pieces of a stream; leaving early closes it."""
    release_openmp_team()
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[Any] = asyncio.Queue()

    def send(item: object) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            stream.close()

    def pump() -> None:
        try:
            for piece in stream:
                send(piece)
        except BaseException as error:
            send(error)
        else:
            send(_END)

    threading.Thread(target=pump, name="ape-stream", daemon=True).start()
    finished = False
    try:
        while (item := await pieces.get()) is not _END:
            if isinstance(item, BaseException):
                finished = True
                raise item
            yield item
        finished = True
    finally:
        if not finished:
            # Handed over at once, so that it happens even if this task is cancelled again.
            await asyncio.shield(loop.run_in_executor(None, stream.close))
