"""A conversation: questions, answers, and what the cache did for each of them."""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from ape_integrations.chatbot.files import Passage
from ape_integrations.chatbot.library import Library
from ape_integrations.chatbot.pipeline import Pipeline
from ape_integrations.errors import APEError, ConfigError

logger = logging.getLogger(__name__)

State = Literal["answering", "comparing", "done", "stopped", "failed"]

#: Earlier turns that a prompt repeats.
HISTORY_TURNS = 6

#: Conversations that a server keeps; the least recently used ones leave first.
KEPT_CONVERSATIONS = 200

#: Seconds between two looks at an answer that goes on: text arrives in readable portions.
_PAUSE = 0.05

#: Seconds before the first look.
_FIRST_LOOK = 0.15

#: Seconds for showing an answer before the comparison with it is measured.
_DRAWING = 0.25


@dataclass
class Sequential:
    """The same prompt without APE.

    Parameters
    ----------
    answer : str
        What the model said.
    first_token_seconds : float or None
        Seconds to the first token; None while it is not known.
    problem : str
        Why there is no measurement.
    """

    answer: str = ""
    first_token_seconds: float | None = None
    problem: str = ""


@dataclass
class Turn:
    """A question, and what came of it.

    Parameters
    ----------
    question : str
        What was asked.
    answer : str
        The text so far.
    passages : list of Passage
        What was retrieved, best first.
    prompt : str
        The rendered prompt.
    report : mapping
        What the cache did, as ``GenerationResult.report()`` says it; empty until the answer is
        complete.
    sequential : Sequential or None
        The comparison, where one was asked for.
    state : str
        How far it is.
    error : str
        What went wrong, for people.
    """

    question: str
    answer: str = ""
    passages: list[Passage] = field(default_factory=list)
    prompt: str = ""
    report: Mapping[str, int | float] = field(default_factory=dict)
    sequential: Sequential | None = None
    state: State = "answering"
    error: str = ""
    stopping: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def is_running(self) -> bool:
        """Whether the model works on it."""
        return self.state in ("answering", "comparing")

    @property
    def gain(self) -> float | None:
        """How many times sooner the first token came than sequentially, where both are known."""
        own = self.report.get("first_token_seconds")
        other = self.sequential.first_token_seconds if self.sequential else None
        return other / own if own and other else None


class Conversation:
    """One user's turns over a shared library and model. Thread-safe.

    Parameters
    ----------
    pipeline : Pipeline
        Answers.
    library : Library
        The files.
    max_new_tokens : int
        Tokens that a sequential comparison generates, as the pipeline's model does.
    """

    def __init__(self, pipeline: Pipeline, library: Library, max_new_tokens: int) -> None:
        self._pipeline = pipeline
        self._library = library
        self._max_new_tokens = max_new_tokens
        self._lock = threading.Lock()
        self.turns: list[Turn] = []

    def ask(self, question: str, *, compare: bool = False) -> Iterator[Turn]:
        """Answer a question; yield the turn whenever more of it is known.

        Dropping the iterator stops the answer, as :meth:`stop` does.

        Parameters
        ----------
        question : str
            What to answer.
        compare : bool
            Whether to run the same prompt sequentially afterwards.

        Raises
        ------
        ConfigError
            The question is empty, nothing was read yet, or the last answer is not complete.
        """
        question = question.strip()
        if not question:
            raise ConfigError("Write a question first.")
        if not self._library.passages:
            raise ConfigError(self._library.why_empty())
        with self._lock:
            self._refuse_while_running()
            history = [turn for turn in self.turns if turn.answer][-HISTORY_TURNS:]
            turn = Turn(question)
            self.turns.append(turn)

        def work(changed: Callable[[], None]) -> None:
            with closing(self._pipeline.answer(turn, history)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    if turn.stopping.is_set():
                        return
                    turn.answer += piece
                    changed()
            turn.answer = turn.answer.strip()
            if compare:
                turn.state = "comparing"
                changed()
                turn.stopping.wait(_DRAWING)
                self._run_sequentially(turn, changed)

        return self._follow(turn, work)

    def compare(self) -> Iterator[Turn]:
        """Run the last answer's prompt sequentially, unless that was done or there is none."""
        with self._lock:
            self._refuse_while_running()
            turn = self.turns[-1] if self.turns else None
            if turn is None or turn.sequential or not turn.report:
                return iter(())
            turn.state = "comparing"
            turn.stopping.clear()
        return self._follow(turn, lambda changed: self._run_sequentially(turn, changed))

    def stop(self) -> None:
        """Stop what the model does for this conversation, after the current token."""
        for turn in self.turns[-1:]:
            turn.stopping.set()

    def clear(self) -> None:
        """Stop, and forget all turns."""
        self.stop()
        with self._lock:
            self.turns = []

    def _refuse_while_running(self) -> None:
        if self.turns and self.turns[-1].is_running and not self.turns[-1].stopping.is_set():
            raise ConfigError("The last question is still being answered: wait, or stop it.")

    def _follow(self, turn: Turn, work: Callable[[Callable[[], None]], None]) -> Iterator[Turn]:
        """Do the work in a thread of its own, so that stopping need not wait for the model."""
        changes: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def run() -> None:
            try:
                with self._library.answering():
                    work(lambda: changes.put(True))
                turn.state = "stopped" if turn.stopping.is_set() else "done"
            except APEError as error:
                turn.state, turn.error = "failed", str(error)
            except Exception as error:
                logger.exception("An answer failed")
                turn.state = "failed"
                turn.error = f"The answer failed ({type(error).__name__}: {error})."
            finally:
                changes.put(False)

        thread = threading.Thread(target=run, name="chat-answer", daemon=True)
        return _watch(turn, changes, thread)

    def _run_sequentially(self, turn: Turn, changed: Callable[[], None]) -> None:
        generator = self._pipeline.generator
        turn.sequential = sequential = Sequential()
        try:
            with generator.stream(
                "", (), turn.prompt, max_new_tokens=self._max_new_tokens, do_sample=False
            ) as stream:
                for piece in stream:
                    if turn.stopping.is_set():
                        sequential.problem = "stopped"
                        return
                    sequential.answer += piece
                    changed()
        except APEError as error:
            sequential.problem = str(error)
            return
        sequential.answer = sequential.answer.strip()
        sequential.first_token_seconds = float(stream.result.report()["first_token_seconds"])


def _watch(
    turn: Turn, changes: queue.SimpleQueue[bool], thread: threading.Thread
) -> Iterator[Turn]:
    """Yield the turn when it has changed, at most every `_PAUSE` seconds, until it is complete."""
    thread.start()
    try:
        # A first token that comes soon is not delayed by drawing a page without it.
        turn.stopping.wait(_FIRST_LOOK)
        yield turn
        going = True
        while going and not turn.stopping.wait(_PAUSE):
            changed = False
            while going and not changes.empty():
                going = changes.get()
                changed = True
            if changed:
                yield turn
        if turn.stopping.is_set() and turn.is_running:
            turn.state = "stopped"
        yield turn
    finally:
        if turn.is_running:
            turn.stopping.set()
            turn.state = "stopped"


class Conversations:
    """The conversations of a server by the name of their browser tab. Thread-safe.

    Parameters
    ----------
    start : callable
        Makes an empty conversation.
    """

    def __init__(self, start: Callable[[], Conversation]) -> None:
        self._start = start
        self._kept: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Conversation:
        with self._lock:
            if name not in self._kept:
                self._kept[name] = self._start()
            self._kept.move_to_end(name)
            while len(self._kept) > KEPT_CONVERSATIONS:
                self._kept.popitem(last=False)[1].stop()
            return self._kept[name]
