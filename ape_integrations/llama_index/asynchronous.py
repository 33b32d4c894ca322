"""Generation from a coroutine: the event loop keeps running, cancelling stops the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ape_integrations.core.generation import GenerationStream

T = TypeVar("T")


class Cancellation:
    """A stopping criterion of ``generate()`` that another thread can fulfil."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Stop after the current token."""
        self._event.set()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return a tensor ``(batch,)``: whether each sequence is done."""
        return input_ids.new_full((input_ids.shape[0],), self._event.is_set()).bool()


async def in_thread(run: Callable[[Cancellation], T]) -> T:
    """Run a generation in a worker thread; cancelling the awaiting task stops it.

    Parameters
    ----------
    run : callable
        Generates with the cancellation among its stopping criteria.
    """
    cancellation = Cancellation()
    try:
        return await asyncio.to_thread(run, cancellation)
    except asyncio.CancelledError:
        cancellation.cancel()
        raise


async def pieces(stream: GenerationStream) -> AsyncGenerator[str, None]:
    """Yield a stream's pieces; closing the generator or cancelling its task stops the stream."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

    def post(item: str | BaseException | None) -> None:
        loop.call_soon_threadsafe(items.put_nowait, item)

    def pump() -> None:
        try:
            try:
                for piece in stream:
                    post(piece)
            except Exception as error:
                post(error)
            else:
                post(None)
        except RuntimeError:  # the loop was closed, nobody listens any more
            stream.close()

    threading.Thread(target=pump, name="ape-astream", daemon=True).start()
    ended = False
    try:
        while (item := await items.get()) is not None:
            if isinstance(item, BaseException):
                ended = True
                raise item
            yield item
        ended = True
    finally:
        if not ended:
            # Waiting for the current token would hold up whoever cancelled.
            loop.run_in_executor(None, stream.close)
