"""Figures and uses of entries, gathered in memory so that a load need not write."""

from __future__ import annotations

import threading
import time
from collections import Counter

MAX_PENDING = 256
"""Uses gathered before they are written down even if nothing is stored meanwhile."""


class PendingUsage:
    """What happened since the index was last told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[str, tuple[int, float]] = {}
        self._counts: Counter[str] = Counter()
        self._due = MAX_PENDING

    def hit(self, key: str) -> None:
        """Note that an entry was loaded."""
        with self._lock:
            self._counts["hits"] += 1
            # Popped first: the order of the dictionary is the order of last uses.
            count, _ = self._uses.pop(key, (0, 0.0))
            self._uses[key] = (count + 1, time.time())

    def count(self, name: str) -> None:
        """Note an event."""
        with self._lock:
            self._counts[name] += 1

    @property
    def is_due(self) -> bool:
        """Whether enough has gathered to be written down."""
        return len(self._uses) >= self._due

    def take(self) -> tuple[dict[str, tuple[int, float]], Counter[str]]:
        """Return and forget what has gathered: uses (oldest first) and counts."""
        with self._lock:
            uses, self._uses = self._uses, {}
            counts, self._counts = self._counts, Counter()
            self._due = MAX_PENDING
        return uses, counts

    def give_back(self, uses: dict[str, tuple[int, float]], counts: Counter[str]) -> None:
        """Put back what could not be written down, to try again when as much more has gathered."""
        with self._lock:
            self._counts.update(counts)
            if len(uses) + len(self._uses) < 16 * MAX_PENDING:
                self._uses = {**uses, **self._uses}
            self._due = len(self._uses) + MAX_PENDING
