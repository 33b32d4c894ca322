"""Whether loading stored states pays, by what loading and prefilling were seen to cost.

Below the break-even (very short contexts, a slow disk) an ordinary prefill of the whole prompt is
sooner done than reading its contexts' states. The decision is taken on strong evidence alone: both
costs must have been observed several times in this process, the fastest load counts (a busy machine
makes single ones slow), and plain prefill must be predicted to take at most half of its time and to
save a noticeable one.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Plan = Literal["cached", "plain"]

#: Observations of each kind that are kept, and that it takes to decide anything.
_KEPT, _EVIDENCE = 8, 6

#: How many times longer loading must take than a plain prefill, and how many seconds longer.
_FACTOR, _LEAST_SAVING = 2.0, 0.020

#: One in so many plain prefills is given up to see whether loading has become faster.
_PROBE = 16

#: How far a prompt may exceed the keys that an observed pass has seen (attention grows with them),
#: and the tokens that it has read (each pass has a cost of its own, which long ones share out).
_REACH, _COMPARABLE = 4, 8


@dataclass(frozen=True)
class _Load:
    nbytes: int
    entries: int
    seconds: float

    def scaled(self, nbytes: int, entries: int) -> float:
        """Return a lower bound of what a load costs that has a price per byte and per entry."""
        return self.seconds * min(nbytes / self.nbytes, entries / self.entries)


@dataclass(frozen=True)
class _Prefill:
    tokens: int
    span: int
    seconds: float

    def scaled(self, tokens: int) -> float:
        return self.seconds * max(1.0, tokens / self.tokens)


class BreakEven:
    """Learns what loading and prefilling cost, and says which one is sooner done. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loads: deque[_Load] = deque(maxlen=_KEPT)
        self._prefills: deque[_Prefill] = deque(maxlen=2 * _KEPT)
        self._plain = 0

    def observe_load(self, nbytes: int, entries: int, seconds: float) -> None:
        """Note how long the states of a whole context set took from the store into place.

        Parameters
        ----------
        nbytes : int
            Size of the states as they are computed with.
        entries : int
            Contexts; each is a store's entry.
        seconds : float
            From the first request to the last byte.
        """
        if nbytes and entries:
            with self._lock:
                self._loads.append(_Load(nbytes, entries, seconds))

    def observe_prefill(self, tokens: int, span: int, seconds: float) -> None:
        """Note how long new tokens took.

        Parameters
        ----------
        tokens : int
            Tokens read.
        span : int
            Keys that the last of them saw.
        seconds : float
            For all of them.
        """
        if tokens:
            with self._lock:
                self._prefills.append(_Prefill(tokens, span, seconds))

    def load_seconds(self, nbytes: int, entries: int) -> float | None:
        """Predict the least time to load a context set; None without evidence."""
        with self._lock:
            predicted = [load.scaled(nbytes, entries) for load in self._loads]
        return min(predicted) if len(predicted) >= _EVIDENCE else None

    def prefill_seconds(self, tokens: int) -> float | None:
        """Predict the time of an ordinary prefill of a whole prompt; None without evidence."""
        with self._lock:
            near = [seen for seen in self._prefills if tokens <= _REACH * seen.span]
        alike = [seen for seen in near if tokens <= _COMPARABLE * seen.tokens]
        # Passes over few tokens make a token look dearer than it is, which is the safe side.
        used = alike if len(alike) >= _EVIDENCE else near
        if len(used) < _EVIDENCE:
            return None
        return statistics.median(seen.scaled(tokens) for seen in used)

    def plan(self, nbytes: int, entries: int, tokens: int, assembled: Callable[[], bool]) -> Plan:
        """Decide for one prompt.

        Parameters
        ----------
        nbytes, entries : int
            Size of its contexts' states, and their number.
        tokens : int
            Tokens of the whole prompt.
        assembled : callable
            Whether the set stands assembled, so that there is nothing to load; asked only where it
            matters.
        """
        load, prefill = self.load_seconds(nbytes, entries), self.prefill_seconds(tokens)
        if load is None or prefill is None:
            return "cached"
        if load < _FACTOR * prefill or load - prefill < _LEAST_SAVING or assembled():
            return "cached"
        with self._lock:
            self._plain += 1
            return "cached" if self._plain % _PROBE == 0 else "plain"
