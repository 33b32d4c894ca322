"""One background thread that does slow work in order, with a bounded amount waiting."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 5.0


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
        self._work: deque[tuple[Callable[[], None], int]] = deque()
        self._bytes = 0
        self._unfinished = 0
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def submit(self, work: Callable[[], None], nbytes: int = 0, *, wait: bool = True) -> bool:
        """Have `work` done after all that was submitted before.

        Parameters
        ----------
        work : callable
            Called once in the background thread.
        nbytes : int
            Memory that it holds until then. One piece of work is accepted whatever its size.
        wait : bool
            Wait for room; otherwise work for which there is no room is refused.

        Returns
        -------
        bool
            False where it was refused.
        """
        self._forget_parents_work()
        with self._changed:
            while self._bytes and self._bytes + nbytes > self._max_bytes:
                if not wait:
                    return False
                self._start()
                self._changed.wait()
            self._work.append((work, nbytes))
            self._bytes += nbytes
            self._unfinished += 1
            self._start()
            self._changed.notify_all()
        return True

    def flush(self) -> None:
        """Wait until all work submitted so far is done."""
        self._forget_parents_work()
        with self._changed:
            if self._unfinished:
                self._start()
            self._changed.wait_for(lambda: self._unfinished == 0)

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._run, name="ape-integrations-write-back", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work, timeout=_IDLE_SECONDS)
                if not self._work:
                    self._thread = None
                    return
                work, nbytes = self._work.popleft()
            try:
                work()
            except Exception:
                logger.exception("Background work of a store failed")
            del work
            with self._changed:
                self._bytes -= nbytes
                self._unfinished -= 1
                self._changed.notify_all()

    def _forget_parents_work(self) -> None:
        """Start afresh in a forked child: the parent's thread, and its lock's holder, are gone."""
        if self._process != os.getpid():
            self.__init__(self._max_bytes)  # type: ignore[misc]
