"""Questions over one set of contexts that wait for each other anyway are answered together.

While a generation runs, further calls over the same contexts and with the same settings collect;
the next generation takes them all, so that weights and contexts are read once for them at every
step. Nobody waits for a clock: a call that finds nothing running starts at once. Calls that belong
together from the start (LangChain's ``batch``) are announced, and their first one waits for them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from ape_integrations.core.generation import Cancellation, GenerationResult
from ape_integrations.core.model import ModelInfo
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.core.settings import GenerationSettings
from ape_integrations.core.state_source import Figures
from ape_integrations.core.threads import PassingExecutor, release_openmp_team
from ape_integrations.forks import forget_in_children

T = TypeVar("T")
R = TypeVar("R")

#: Questions of one batch, at most.
MOST_ROWS = 32

#: Seconds to wait for announced calls, which may be held up by callbacks of their own.
_PATIENCE = 2.0

#: Padded tokens per query token of a batch, and padded tokens that need no excuse.
_PADDING_FACTOR, _PADDING_FREE = 2, 512


@dataclass
class Request:
    """One prompt and how to answer it.

    Parameters
    ----------
    prompt : PreparedPrompt
        Token ids.
    settings : GenerationSettings
        Arguments of the generation.
    figures : Figures
        What the cache does for it; its clock starts here.
    """

    prompt: PreparedPrompt
    settings: GenerationSettings
    figures: Figures = field(default_factory=Figures)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return any(c.requested.is_set() for c in self.settings.cancellations)


class _Call:
    """A request and the thread that waits for its answer."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.turn = threading.Event()
        self.role: Literal["lead", "alone", "answered"] | None = None
        self.answer: GenerationResult | BaseException | None = None
        self._abandoned = Cancellation()
        request.settings.cancellations.append(self._abandoned)

    def abandon(self) -> None:
        """Stop generating for it."""
        self._abandoned.requested.set()

    def give(self, answer: GenerationResult | BaseException) -> None:
        self.answer, self.role = answer, "answered"
        self.turn.set()

    def wake(self, role: Literal["lead", "alone"]) -> None:
        self.role = role
        self.turn.set()


class SharedBatches:
    """Runs requests that share a key together, one batch at a time per key. Thread-safe.

    The thread of the first request runs the batch; no thread of its own is needed. Where a batch
    fails, each of its requests is run alone, so that an error reaches nobody but its cause.

    Parameters
    ----------
    run : callable
        Answers requests, in order.
    info : ModelInfo
        Shapes of the states, by which memory is counted.
    max_bytes : int
        Memory for the states behind the contexts in one batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Request]], list[GenerationResult]],
        info: ModelInfo,
        max_bytes: int,
    ) -> None:
        self._run = run
        self._info = info
        self._max_bytes = max_bytes
        self.forget_other_threads()
        forget_in_children(self)

    def forget_other_threads(self) -> None:
        """Forget calls and batches of other threads, which a forked process does not have."""
        self._lock = threading.Lock()
        #: Calls that wait, by key; a key is there as long as a batch of it runs.
        self._waiting: dict[Hashable, list[_Call]] = {}

    def answer(self, request: Request, key: Hashable | None) -> GenerationResult:
        """Answer a request, together with others of its key where some wait.

        Parameters
        ----------
        request : Request
            Prompt and settings.
        key : hashable or None
            Equal for requests that one generation can answer; None is answered alone.
        """
        member = _member.get()
        if key is None:
            arrive()
            return self._run([request])[0]
        call = _Call(request)
        with self._lock:
            leads = key not in self._waiting
            self._waiting.setdefault(key, []).append(call)
        arrive()
        if leads:
            call.role = "lead"
        else:
            self._wait(key, call)
        if call.role == "lead":
            self._lead(key, call, member)
        if call.role == "alone":
            return self._run([request])[0]
        if isinstance(call.answer, GenerationResult):
            return call.answer
        assert call.answer is not None
        raise call.answer

    def waiting(self) -> int:
        """Return how many requests wait for their batch to begin."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def _wait(self, key: Hashable, call: _Call) -> None:
        release_openmp_team()
        try:
            call.turn.wait()
        except BaseException:  # an interrupt of the main thread
            call.abandon()
            with self._lock:
                self._withdraw(key, call)
            if call.role == "lead":
                self._pass_on(key)
            raise

    def _withdraw(self, key: Hashable, call: _Call) -> None:
        """Let a call wait no longer: its thread is leaving."""
        waiting = self._waiting.get(key, [])
        if call in waiting:
            waiting.remove(call)

    def _lead(self, key: Hashable, call: _Call, member: _Member | None) -> None:
        """Run the batch that has collected, and make the longest waiting call the next leader."""
        batch: list[_Call] = [call]
        try:
            if member is not None:
                member.gathering.wait()
            with member.gathering.slots if member is not None else nullcontext():
                batch = self._take(key)
                if batch:
                    answers = self._run([other.request for other in batch])
                    for other, answer in zip(batch, answers, strict=True):
                        other.give(answer)
        except BaseException as error:
            with self._lock:
                self._withdraw(key, call)
            others = [other for other in batch if other is not call]
            for other in others:
                other.wake("alone")
            if not others or not isinstance(error, Exception):
                raise
            if call in batch:
                call.role = "alone"
        finally:
            self._pass_on(key)

    def _take(self, key: Hashable) -> list[_Call]:
        """Take the calls that run next, the longest waiting first, as many as there is room for."""
        with self._lock:
            waiting = self._waiting[key]
            for call in [call for call in waiting if call.request.cancelled]:
                waiting.remove(call)
                call.give(CancelledError("The call was cancelled before it began."))
            batch: list[_Call] = []
            for call in waiting:
                if len(batch) < MOST_ROWS and self._fits([*batch, call]):
                    batch.append(call)
            self._waiting[key] = [call for call in waiting if call not in batch]
            return batch

    def _fits(self, batch: Sequence[_Call]) -> bool:
        """Whether a batch stays within its memory, and is not mostly padding."""
        if len(batch) == 1:
            return True
        lengths = [len(call.request.prompt.query) for call in batch]
        new_tokens = batch[0].request.settings.max_new_tokens
        padded = len(batch) * max(lengths)
        nbytes = len(batch) * self._info.spec(max(lengths) + new_tokens).nbytes
        return nbytes <= self._max_bytes and (
            padded <= _PADDING_FREE or padded <= _PADDING_FACTOR * sum(lengths)
        )

    def _pass_on(self, key: Hashable) -> None:
        with self._lock:
            if waiting := self._waiting[key]:
                waiting[0].wake("lead")
            else:
                del self._waiting[key]


# Calls that belong together ----------------------------------------------------------------------


class Gathering:
    """Calls that were announced together: the first to generate waits until the others are there.

    Parameters
    ----------
    expected : int
        Calls that run at the same time, each as a :meth:`member`.

    Attributes
    ----------
    slots : Semaphore
        Bounds how many generations run side by side where the calls share nothing.
    """

    def __init__(self, expected: int) -> None:
        self._lock = threading.Lock()
        self._missing = expected
        self._complete = threading.Event()
        self.slots = threading.Semaphore(min(MOST_ROWS, (os.cpu_count() or 1) + 4))

    @contextmanager
    def member(self) -> Iterator[None]:
        """Make what runs inside, in this thread or task, one of the announced calls."""
        member = _Member(self)
        token = _member.set(member)
        try:
            yield
        finally:
            _member.reset(token)
            member.arrive()

    def arrive(self) -> None:
        """Count a call that is ready, or that will never be."""
        with self._lock:
            self._missing -= 1
            if self._missing <= 0:
                self._complete.set()

    def wait(self) -> None:
        """Wait until all are there; a call that is held up elsewhere is not waited for long."""
        self._complete.wait(_PATIENCE)


class _Member:
    """One call of a gathering, which arrives once."""

    def __init__(self, gathering: Gathering) -> None:
        self.gathering = gathering
        self._lock = threading.Lock()
        self._arrived = False

    def arrive(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, True
        if not arrived:
            self.gathering.arrive()


_member: ContextVar[_Member | None] = ContextVar("ape_gathering", default=None)


def arrive() -> None:
    """Tell those who wait for the call that runs here that it has come as far as generating."""
    member = _member.get()
    if member is not None:
        member.arrive()


def run_together(call: Callable[[T], R], items: Sequence[T], at_once: int | None = None) -> list[R]:
    """Run a call for each item in threads of their own, announced to each other.

    Parameters
    ----------
    call : callable
        Generates; sees the caller's context variables.
    items : sequence
        What it is called with.
    at_once : int, optional
        Calls that may run at the same time.

    Returns
    -------
    list
        What the calls returned, in order.
    """
    workers = min(len(items), at_once or MOST_ROWS)
    gathering = Gathering(workers)

    def run(item: T) -> R:
        with gathering.member():
            return call(item)

    contexts = [copy_context() for _ in items]
    release_openmp_team()
    with PassingExecutor(workers, "ape-batch") as pool:
        return list(pool.map(lambda context, item: context.run(run, item), contexts, items))
