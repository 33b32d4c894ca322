"""Around ``model.generate()``: results, stop strings, streaming, reproducible sampling."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ape_integrations.core.threads import release_openmp_team
from ape_integrations.core.tokens import IncrementalDecoder, Tokens
from ape_integrations.errors import ConfigError


@dataclass
class GenerationResult:
    """What a generation gave.

    Parameters
    ----------
    text : str
        Generated text, cut before a stop string.
    token_ids : list of int
        Generated ids, special tokens included.
    finish_reason : str
        ``"stop"`` (end of sequence, stop string, stopping criterion) or ``"length"``.
    usage : dict
        ``prompt_tokens``, ``completion_tokens``, ``total_tokens``; and ``cached_tokens``, those of
        the prompt that were read from stored or kept states.
    cache : dict
        ``contexts`` that were read, and ``dropped``: those that others were preferred to; ``hits``,
        ``misses``, ``bytes_loaded``; ``tokens_reused``: query tokens
        whose states were kept from an earlier turn over the same contexts; ``batch``: the
        questions over these contexts that were answered together with this one, itself included;
        and ``plan``: "cached", or "plain" for a prompt that was prefilled as a whole.
    timings : dict
        Seconds: ``load`` (states from the store), ``encode`` (missing contexts), ``select`` (the
        contexts that get the most attention), ``recompute`` (contexts put in sequence),
        ``first_token`` (from the call to the first new token) and ``total``.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    usage: dict[str, int] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Return what the cache did, as responses carry it.

        Returns
        -------
        dict
            What ``cache`` holds, and the ``timings``, as ``load_seconds``,
            ``first_token_seconds``, ...
        """
        return {
            **self.cache,
            **{f"{name}_seconds": seconds for name, seconds in self.timings.items()},
        }


class TextAssembler:
    """Turns generated ids into text, holds back what may become a stop string, and stops at one.

    Parameters
    ----------
    tokens : Tokens
        Decodes ids.
    stop : sequence of str
        Generation ends before the first of them.
    """

    def __init__(self, tokens: Tokens, stop: Sequence[str]) -> None:
        self._decoder = IncrementalDecoder(tokens)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """Return the text that may be shown now."""
        if self.stopped:
            return ""
        self._held += self._decoder.push(ids, last=last)
        cut = min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.stopped, safe = True, cut
        else:
            safe = len(self._held) - (0 if last else self._possible_stop())
        shown, self._held = self._held[:safe], self._held[safe:]
        self.text += shown
        return shown

    def _possible_stop(self) -> int:
        """Return how many characters at the end could be the start of a stop string."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self._stop):
                return size
        return 0


def listed(name: str, given: Any) -> list[Any]:
    """Return logits processors or stopping criteria as a list; one alone is a list of one.

    Raises
    ------
    ConfigError
        They are something else.
    """
    if given is None:
        return []
    # A list of them can be called itself.
    items = list(given) if isinstance(given, Iterable) else [given]
    if not all(map(callable, items)):
        raise ConfigError(f"{name} must be a list of what can be called, not {given!r}.")
    return items


class Cancellation(StoppingCriteria):
    """Stops one generation after the current token, once it is requested."""

    def __init__(self) -> None:
        self.requested = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say of every sequence whether to stop."""
        stop = self.requested.is_set()
        return torch.full((input_ids.shape[0],), stop, device=input_ids.device, dtype=torch.bool)


@dataclass
class Row:
    """One sequence of a batch while it is generated.

    Parameters
    ----------
    assembler : TextAssembler
        Makes text of the tokens.
    token_ids : list of int
        New tokens so far.
    stopped : bool
        It ended by an end-of-sequence token, a stop string or a stopping criterion.
    cancellations : sequence of Cancellation
        What may stop this sequence and no other.
    """

    assembler: TextAssembler
    token_ids: list[int] = field(default_factory=list)
    stopped: bool = False
    cancellations: Sequence[Cancellation] = ()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for this sequence any more."""
        return any(cancellation.requested.is_set() for cancellation in self.cancellations)


class TokenSink(StoppingCriteria):
    """Receives every new token of ``model.generate()`` and says which sequences stop.

    Parameters
    ----------
    rows : sequence of Row
        One per sequence.
    prompt_length : int
        Ids that stand before the first new token.
    end_tokens : sequence of int
        Ids that end a sequence.
    criteria : sequence of StoppingCriteria
        The caller's own.
    on_text : callable, optional
        Called with each new piece of the first sequence's text.
    single : bool
        Each sequence grows token by token. Beams do not, so their text is read at the end.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prompt_length: int,
        end_tokens: Sequence[int],
        criteria: Sequence[StoppingCriteria] = (),
        on_text: Callable[[str], None] | None = None,
        single: bool = True,
    ) -> None:
        self.rows = rows
        self._seen = prompt_length
        self._end_tokens = set(end_tokens)
        self._criteria = StoppingCriteriaList(criteria)
        self._on_text = on_text
        self._single = single
        self.cancelled = threading.Event()
        self.first_token_time: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Take what is new in ``input_ids`` and say which sequences stop."""
        if self.first_token_time is None:
            self.first_token_time = time.perf_counter()
        stop = torch.zeros(input_ids.shape[0], device=input_ids.device, dtype=torch.bool)
        if self._criteria:
            ids: Any = input_ids
            stop |= self._criteria(ids, scores, **kwargs)
        if self._single:
            wanted = stop.tolist()
            for index, new in enumerate(input_ids[:, self._seen :].tolist()):
                row = self.rows[index]
                if not row.stopped:
                    self._take(row, new)
                    row.stopped |= wanted[index] or row.cancelled
                stop[index] = row.stopped
            self._seen = input_ids.shape[1]
        return stop | (self.cancelled.is_set() or all(row.cancelled for row in self.rows))

    def finish(self, sequences: Tensor) -> None:
        """Take what is left of the finished ``sequences``, prompt included, and show it."""
        for row, new in zip(self.rows, sequences[:, self._seen :].tolist(), strict=True):
            if not row.stopped:
                self._take(row, new)
            self._show(row, [], last=True)

    def _take(self, row: Row, new: list[int]) -> None:
        """Add new ids up to the first that ends the sequence."""
        end = next((i for i, token in enumerate(new) if token in self._end_tokens), None)
        new = new if end is None else new[: end + 1]
        row.token_ids += new
        self._show(row, new)
        row.stopped |= end is not None or row.assembler.stopped

    def _show(self, row: Row, ids: list[int], *, last: bool = False) -> None:
        text = row.assembler.push(ids, last=last)
        if text and self._on_text is not None and row is self.rows[0]:
            self._on_text(text)


#: Settings that only sampling has, in the order in which transformers applies them.
SAMPLING = (
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


def warpers(settings: Mapping[str, Any], device: torch.device | str = "cpu") -> LogitsProcessorList:
    """Return what transformers narrows the choice of tokens with before it samples.

    Parameters
    ----------
    settings : mapping
        Values of :data:`SAMPLING`; None switches one off.
    device : torch.device or str
        Where the scores are.

    Raises
    ------
    TypeError, ValueError
        A value is out of range.
    """
    temperature, top_h, top_k, top_p, min_p, typical_p, epsilon, eta = map(settings.get, SAMPLING)
    chosen: list[LogitsProcessor] = []
    if temperature is not None and temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(temperature))
    if top_h is not None:
        chosen.append(TopHLogitsWarper(top_h))
    if top_k is not None and top_k != 0:
        chosen.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        chosen.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        chosen.append(MinPLogitsWarper(min_p))
    if typical_p is not None and typical_p < 1.0:
        chosen.append(TypicalLogitsWarper(typical_p))
    if epsilon is not None and 0.0 < epsilon < 1.0:
        chosen.append(EpsilonLogitsWarper(epsilon))
    if eta is not None and 0.0 < eta < 1.0:
        chosen.append(EtaLogitsWarper(eta, device=str(device)))
    return LogitsProcessorList(chosen)


class SeededSampler(LogitsProcessor):
    """Samples with a random generator of its own, so that threads do not disturb each other.

    Runs under greedy decoding: it draws a token itself and leaves only that one possible.

    Parameters
    ----------
    seed : int
        Of the random generator.
    settings : mapping
        Values of :data:`SAMPLING`.
    watermarking : optional
        Watermarking config of transformers; the mark is put on what the draw chooses from.
    """

    def __init__(
        self, seed: int, settings: Mapping[str, Any], watermarking: Any | None = None
    ) -> None:
        self._seed = seed
        self._settings = settings
        self._watermarking = watermarking
        self._generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores in which one token per row is possible."""
        if self._generator is None:
            self._prepare(scores)
        warped: Any = self._warpers(input_ids, scores)  # type: ignore[arg-type]
        probabilities = warped.softmax(dim=-1)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def _prepare(self, scores: Tensor) -> None:
        self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        self._warpers = warpers(self._settings, scores.device)
        if self._watermarking is not None:
            mark = self._watermarking.construct_processor(scores.shape[-1], scores.device)
            self._warpers.append(mark)


class RowSamplers(LogitsProcessor):
    """Samples every sequence of a batch as its own call would, alone.

    Parameters
    ----------
    samplers : sequence of SeededSampler
        One per sequence.
    """

    def __init__(self, samplers: Sequence[SeededSampler]) -> None:
        self._samplers = samplers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores in which one token per row is possible."""
        rows = zip(self._samplers, input_ids.split(1), scores.split(1), strict=True)
        return torch.cat([sampler(ids, own) for sampler, ids, own in rows])


_open_streams: weakref.WeakSet[GenerationStream] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """Stop streams that nobody read to their end: a thread cannot be killed inside torch."""
    for stream in list(_open_streams):
        stream.close()


class GenerationStream(Iterator[str]):
    """Pieces of text as they are generated; :attr:`result` once it is exhausted.

    Generation runs in a thread of its own. Closing the stream early (``close()``, leaving a
    ``with`` block, or dropping the last reference) stops it after the current token.

    Parameters
    ----------
    run : callable
        Generates; is given a function for pieces of text and one for the sink that cancels.
    """

    _END = object()

    def __init__(
        self,
        run: Callable[[Callable[[str], None], Callable[[TokenSink], None]], GenerationResult],
    ) -> None:
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._state = _StreamState()
        self._thread = threading.Thread(
            target=_run_stream, args=(run, self._queue, self._state), daemon=True
        )
        self._started = False
        self._finished = False
        _open_streams.add(self)

    @property
    def result(self) -> GenerationResult:
        """The whole result, after the last piece.

        Raises
        ------
        RuntimeError
            The stream has not ended, or was closed before it did.
        """
        if self._state.result is None or not self._finished:
            raise RuntimeError("The result is known once the stream has been read to its end.")
        return self._state.result

    def __iter__(self) -> GenerationStream:
        """Return the stream itself."""
        return self

    def __next__(self) -> str:
        """Return the next piece of text."""
        if self._finished:
            raise StopIteration
        if not self._started:
            release_openmp_team()
            self._thread.start()
            self._started = True
        item = self._queue.get()
        if isinstance(item, str):
            return item
        self._finished = True
        self._thread.join()
        if isinstance(item, StopIteration):  # which would look like the end of the text
            raise RuntimeError("A processor or callback raised StopIteration.") from item
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def close(self) -> None:
        """Stop generating and wait until everything it held is free."""
        self._finished = True
        self._state.cancel()
        if self._started and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> GenerationStream:
        """Return the stream itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the stream."""
        self.close()

    def __del__(self) -> None:
        """Stop generating when nobody listens any more."""
        self._state.cancel()


class _StreamState:
    """Shared by a stream and its thread, so that a dropped stream can be collected."""

    def __init__(self) -> None:
        self.result: GenerationResult | None = None
        self._lock = threading.Lock()
        self._cancelled = False
        self._sink: TokenSink | None = None

    def set_sink(self, sink: TokenSink) -> None:
        with self._lock:
            self._sink = sink
            if self._cancelled:
                sink.cancelled.set()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._sink is not None:
                self._sink.cancelled.set()


def _run_stream(
    run: Callable[[Callable[[str], None], Callable[[TokenSink], None]], GenerationResult],
    pieces: queue.SimpleQueue[object],
    state: _StreamState,
) -> None:
    try:
        state.result = run(pieces.put, state.set_sink)
    except BaseException as error:  # handed to the reader, who would wait for ever otherwise
        pieces.put(error)
    else:
        pieces.put(GenerationStream._END)
