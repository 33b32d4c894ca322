"""Who encodes a missing context: one of the threads, and one of the processes, that miss it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ape_integrations.forks import forget_in_children
from ape_integrations.store.files import try_lock, unlock_and_close

MAX_LOCK_FILES = 128
"""Lock files held at most; keys beyond are agreed upon within this process only."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.1


class EncodingLocks:
    """Locks by key between threads, and between processes where there is a directory.

    Processes use ``flock``: a holder that dies loses its locks, so nobody waits for the dead. Where
    lock files cannot be made, threads still agree, and processes may encode the same context.

    Parameters
    ----------
    directory : Path, optional
        Where lock files go.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        self.forget_other_threads()
        forget_in_children(self)

    def forget_other_threads(self) -> None:
        """Forget what other threads hold, which a forked process does not have."""
        self._changed = threading.Condition()
        self._held: set[str] = set()
        for descriptor in self._descriptors.values():  # the parent's lock stays the parent's
            os.close(descriptor)
        self._descriptors = {}

    @contextmanager
    def hold(
        self, keys: str | Iterable[str], timeout: float = 0.0, prefix: str = ""
    ) -> Iterator[frozenset[str]]:
        """Hold those of the keys that are free or become free in time; see `KVStore.encoding_lock`.

        Parameters
        ----------
        keys : str or iterable of str
            The keys.
        timeout : float
            Seconds to wait, in total, for keys that others hold.
        prefix : str
            Put before every key to tell apart what must not be shared.
        """
        deadline = time.monotonic() + timeout
        held: list[str] = []
        try:
            # All callers take keys in one order: two that want the same keys cannot block each
            # other.
            for key in sorted({keys} if isinstance(keys, str) else set(keys)):
                if self._acquire(prefix + key, deadline):
                    held.append(key)
            yield frozenset(held)
        finally:
            for key in held:
                self._release(prefix + key)

    def _acquire(self, key: str, deadline: float) -> bool:
        with self._changed:
            remaining = max(0.0, deadline - time.monotonic())
            if not self._changed.wait_for(lambda: key not in self._held, remaining):
                return False
            self._held.add(key)
        try:
            others_hold_it = not self._acquire_file(key, deadline)
        except OSError:
            others_hold_it = False
        except BaseException:
            self._release(key)
            raise
        if others_hold_it:
            self._release(key)
        return not others_hold_it

    def _acquire_file(self, key: str, deadline: float) -> bool:
        if self._directory is None or len(self._descriptors) >= MAX_LOCK_FILES:
            return True
        self._directory.mkdir(mode=0o700, exist_ok=True)
        path = self._path(key)
        pause = _FIRST_PAUSE
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # A holder removes the file before it lets go: whoever opened it before that must look
            # for the new one.
            if try_lock(descriptor):
                if os.fstat(descriptor).st_nlink:
                    self._descriptors[key] = descriptor
                    return True
                os.close(descriptor)
                continue
            os.close(descriptor)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _release(self, key: str) -> None:
        descriptor = self._descriptors.pop(key, None)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                self._path(key).unlink()
            unlock_and_close(descriptor)
        with self._changed:
            self._held.discard(key)
            self._changed.notify_all()

    def _path(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.lock"
