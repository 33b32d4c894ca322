"""One background thread that does slow work in order, with a bounded amount waiting."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from ape_integrations.store.at_exit import call_at_exit

logger = logging.getLogger(__name__)

Work = Callable[[], object]

_QUIET_SECONDS = 1.0
"""Time without any sign of activity after which work that is not urgent begins."""

_IDLE_SECONDS = 5.0
"""Time without work after which the thread ends."""


class WriteBack:
    """A queue of work for one background thread.

    The thread starts with the first work and ends when there has been none for a while, so that
    an abandoned store leaves no thread behind. After a fork the child starts its own.

    Parameters
    ----------
    max_bytes : int
        Bytes of states that may wait; who adds more waits for room.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._urgent: deque[tuple[Work, int]] = deque()
        self._patient: deque[tuple[Work, int]] = deque()
        self._bytes = 0
        self._unfinished = 0
        self._flushing = 0
        self._waiting = 0
        self._last_activity = 0.0
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        call_at_exit(self, WriteBack.finish)

    def submit(self, work: Work, nbytes: int = 0) -> None:
        """Have `work` done after all that was submitted before.

        Parameters
        ----------
        work : callable
            Called once in the background thread.
        nbytes : int
            Memory that it holds until then; the call waits for room. One piece of work is accepted
            whatever its size.
        """
        self._forget_parents_work()
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                while self._is_full(nbytes):
                    self._start()
                    self._changed.wait()
                self._add(self._urgent, work, nbytes)
                return
            except RuntimeError:
                logger.debug("No thread can be started: work is done at once.")
            finally:
                self._waiting -= 1
        _do(work)

    def submit_patient(self, work: Work, nbytes: int = 0) -> bool:
        """Have `work` done when nothing has been going on for a moment, or room is needed.

        Returns
        -------
        bool
            False where there is no room for it; it is refused then.
        """
        self._forget_parents_work()
        with self._changed:
            if self._is_full(nbytes):
                return False
            try:
                self._add(self._patient, work, nbytes)
            except RuntimeError:  # no thread can be started
                return False
            return True

    def note_activity(self) -> None:
        """Put off work that is not urgent: somebody is waiting for something now."""
        self._last_activity = time.monotonic()

    def flush(self) -> None:
        """Wait until all work submitted so far is done, urgent or not."""
        self._forget_parents_work()
        with self._changed:
            if self._unfinished:
                self._start()
            self._flushing += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._unfinished == 0)
            self._flushing -= 1

    def finish(self) -> None:
        """Do what is urgent now and forget the rest; called when the process ends as well."""
        self._forget_parents_work()
        with self._changed:
            for _, nbytes in self._patient:
                self._bytes -= nbytes
                self._unfinished -= 1
            self._patient.clear()
            self._changed.notify_all()
        self.flush()

    def _is_full(self, nbytes: int) -> bool:
        return self._bytes > 0 and self._bytes + nbytes > self._max_bytes

    def _add(self, queue: deque[tuple[Work, int]], work: Work, nbytes: int) -> None:
        self._start()
        queue.append((work, nbytes))
        self._bytes += nbytes
        self._unfinished += 1
        self._changed.notify_all()

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._run, name="ape-integrations-write-back", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            work, nbytes = item
            _do(work)
            del work, item
            with self._changed:
                self._bytes -= nbytes
                self._unfinished -= 1
                self._changed.notify_all()

    def _next(self) -> tuple[Work, int] | None:
        """Wait for work; None, and no thread any more, where none comes for a while."""
        deadline = time.monotonic() + _IDLE_SECONDS
        with self._changed:
            while True:
                if self._urgent:
                    return self._urgent.popleft()
                now = time.monotonic()
                quiet_at = self._last_activity + _QUIET_SECONDS
                if self._patient and (now >= quiet_at or self._flushing or self._waiting):
                    return self._patient.popleft()
                if not self._patient and now >= deadline:
                    self._thread = None
                    return None
                self._changed.wait((quiet_at if self._patient else deadline) - now)

    def _forget_parents_work(self) -> None:
        """Start afresh in a forked child: the parent's thread, and its lock's holder, are gone."""
        if self._process != os.getpid():
            self.__init__(self._max_bytes)  # type: ignore[misc]


def _do(work: Work) -> None:
    try:
        work()
    except Exception:
        logger.exception("Background work of a store failed")
