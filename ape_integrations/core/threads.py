"""Threads that end with their work.

A thread that has run a parallel torch operation owns a team of OpenMP threads for as long as it
lives. Once there are more of these than cores, none of them waits actively for its next piece of
work any more, and each operation of every other thread takes longer: decoding by a third on two
cores. So no thread of ours stays alive idle, and a thread that is going to wait for another one's
generation gives its team back first.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

from ape_integrations.forks import forget_in_children

P = ParamSpec("P")
T = TypeVar("T")


def release_openmp_team() -> None:
    """Give the calling thread's OpenMP threads back; its next parallel operation makes new ones."""
    pause = _pause_function()
    if pause is not None:
        pause(_SOFT)


_SOFT = 1  # omp_pause_soft: everything but the threads is kept


@lru_cache(maxsize=1)
def _pause_function() -> Callable[[int], int] | None:
    """Return GNU OpenMP's ``omp_pause_resource_all``, which pauses the calling thread alone."""
    try:
        library = ctypes.CDLL(None)
        if hasattr(library, "__kmpc_fork_call") or not hasattr(library, "GOMP_parallel"):
            return None
        function: Callable[[int], int] = library.omp_pause_resource_all
    except (AttributeError, OSError, TypeError):
        return None
    return function


if hasattr(os, "register_at_fork"):
    # A child would wait for its OpenMP threads for ever, which are not there. Those that are given
    # back before are made anew.
    os.register_at_fork(before=release_openmp_team)


class PassingExecutor(Executor):
    """An executor whose threads end as soon as nothing is left to do.

    Parameters
    ----------
    max_workers : int
        Threads at a time.
    name : str
        Name of the threads.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._max_workers = max_workers
        self._name = name
        self._closed = False
        self.forget_other_threads()
        forget_in_children(self)

    def forget_other_threads(self) -> None:
        """Forget threads and what they had to do, which a forked process does not have."""
        self._lock = threading.Lock()
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: set[threading.Thread] = set()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function in a thread of its own, at most ``max_workers`` at a time.

        Raises
        ------
        RuntimeError
            After :meth:`shutdown`; or the system has no thread left, and none of these is alive.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("nothing can be submitted after shutdown")
            self._work.append((future, lambda: fn(*args, **kwargs)))
            if len(self._threads) < self._max_workers:
                self._start_thread()
        return future

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name)
        self._threads.add(thread)
        try:
            thread.start()
        except Exception:
            self._threads.discard(thread)
            # Those that are alive do all the work there is, if slower.
            if not self._threads:
                self._work.pop()
                raise

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._threads.discard(threading.current_thread())
                    return
                future, call = self._work.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            # Nothing is held while waiting for the lock.
            del future, call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; by default wait for what was submitted."""
        with self._lock:
            self._closed = True
            cancelled = list(self._work) if cancel_futures else []
            if cancel_futures:
                self._work.clear()
            threads = list(self._threads)
        for future, _ in cancelled:
            future.cancel()
        for thread in threads if wait else ():
            thread.join()
