"""Switching off what fails, with one warning, and trying again later."""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger(__name__)


class Outage:
    """Whether a medium works at present.

    Parameters
    ----------
    what : str
        What is switched off, for the warning, for example ``"Storing KV states in /var/kv"``.
    retry_after : float
        Seconds after a failure until the medium is tried again.
    """

    def __init__(self, what: str, retry_after: float) -> None:
        self._what = what
        self._retry_after = retry_after
        self._lock = threading.Lock()
        self._failed_at: float | None = None

    @property
    def active(self) -> bool:
        """True while the medium is switched off; False again when it is time for another try."""
        failed_at = self._failed_at
        return failed_at is not None and time.monotonic() - failed_at < self._retry_after

    def begin(self, reason: object) -> None:
        """Switch off after a failure; only the first failure of an outage is a warning."""
        with self._lock:
            first, self._failed_at = self._failed_at is None, time.monotonic()
        level = logging.WARNING if first else logging.DEBUG
        logger.log(level, "%s is off for now: %s. Answers are not affected.", self._what, reason)

    def note(self, message: str) -> None:
        """Log something that needs no switching off."""
        logger.warning("%s: %s.", self._what, message)

    def end(self) -> None:
        """Note that the medium works."""
        if self._failed_at is None:
            return
        with self._lock:
            self._failed_at = None
        logger.info("%s works again.", self._what)
