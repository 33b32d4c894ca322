"""What a forked process must not take over from its parent.

Servers load a model once and fork their workers. A child has one thread alone: work that another
thread of its parent had in hand is never finished there, and nobody lets go of what it held.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class HasThreads(Protocol):
    """Holds work of several threads."""

    def forget_other_threads(self) -> None:
        """Start anew in a forked process, which has none of them."""
        ...


_owners: weakref.WeakSet[HasThreads] = weakref.WeakSet()


def forget_in_children(owner: HasThreads) -> None:
    """Have ``owner.forget_other_threads()`` called in every process forked from this one."""
    _owners.add(owner)


def _forget() -> None:
    for owner in list(_owners):
        owner.forget_other_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
