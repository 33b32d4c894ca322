"""Finishing what a store has in hand when its process ends."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from multiprocessing import util
from typing import TypeVar

T = TypeVar("T")


def call_at_exit(owner: T, finish: Callable[[T], None]) -> None:
    """Call ``finish(owner)`` when the process ends, unless `owner` is gone by then.

    Unlike ``atexit`` this also works in the workers of ``multiprocessing``, which skip it.

    Parameters
    ----------
    owner : object
        Not kept alive.
    finish : callable
        What to do; its errors are ignored.
    """
    reference = weakref.ref(owner)

    def call() -> None:
        alive = reference()
        if alive is not None:
            with contextlib.suppress(Exception):
                finish(alive)

    # A priority is what makes it run at exit at all.
    finalizer = util.Finalize(None, call, exitpriority=0)
    weakref.finalize(owner, finalizer.cancel).atexit = False
