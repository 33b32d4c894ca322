"""Generation without blocking the event loop; a cancelled task stops generating."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextvars import copy_context
from typing import Any, TypeVar

from transformers import StoppingCriteria

from ape_integrations.core.generation import Cancellation, GenerationStream, listed
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
    given = listed("stopping_criteria", generation_kwargs.get("stopping_criteria"))
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


class Pieces(AsyncIterator[str]):
    """The pieces of a stream, read without blocking the event loop; closing them closes it.

    Not an asynchronous generator: a loop that ends closes all of those at once, and one that is
    read by another would be closed from two sides.

    Parameters
    ----------
    stream : GenerationStream
        Starts to be read at once.
    """

    def __init__(self, stream: GenerationStream) -> None:
        release_openmp_team()
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Any] = asyncio.Queue()
        self._finished = False
        threading.Thread(target=self._pump, name="ape-stream", daemon=True).start()

    def _send(self, item: object) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._stream.close()

    def _pump(self) -> None:
        try:
            for piece in self._stream:
                self._send(piece)
        except BaseException as error:
            self._send(error)
        else:
            self._send(_END)

    async def __anext__(self) -> str:
        """Return the next piece, without blocking the event loop."""
        if self._finished:
            raise StopAsyncIteration
        item = await self._pieces.get()
        if isinstance(item, str):
            return item
        self._finished = True
        raise StopAsyncIteration if item is _END else item

    async def aclose(self) -> None:
        """Stop the model, unless it has come to its end."""
        if not self._finished:
            self._finished = True
            # Handed over at once, so that it happens even if this task is cancelled again.
            await asyncio.shield(self._loop.run_in_executor(None, self._stream.close))
