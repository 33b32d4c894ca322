"""Entries that must not be evicted while a generation uses them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ape_integrations.store.files import EntryFiles, unlock_and_close

MAX_LOCKED_FILES = 128
"""Files that pins keep open at most; entries beyond are pinned within this process only."""


@dataclass
class _Pin:
    holders: int = 0
    descriptor: int | None = None


class Pins:
    """Counts who needs an entry, and locks its file so that other processes know as well.

    Parameters
    ----------
    files : EntryFiles
        The store's files.
    """

    def __init__(self, files: EntryFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._pins: dict[str, _Pin] = {}
        self._locked_files = 0

    def __contains__(self, key: str) -> bool:
        return key in self._pins

    @contextmanager
    def hold(self, keys: Iterable[str]) -> Iterator[None]:
        """Pin keys inside a ``with`` block, whether or not they are stored already."""
        held = list(dict.fromkeys(keys))
        with self._lock:
            for key in held:
                self._pins.setdefault(key, _Pin()).holders += 1
        try:
            yield
        finally:
            with self._lock:
                for key in held:
                    self._release(key)

    def attach(self, key: str, name: str) -> None:
        """Lock the file of an entry if the entry is pinned and not locked yet."""
        with self._lock:
            pin = self._pins.get(key)
            if pin and pin.descriptor is None and self._locked_files < MAX_LOCKED_FILES:
                pin.descriptor = self._files.pin(name)
                self._locked_files += pin.descriptor is not None

    def _release(self, key: str) -> None:
        pin = self._pins[key]
        pin.holders -= 1
        if pin.holders:
            return
        del self._pins[key]
        if pin.descriptor is not None:
            unlock_and_close(pin.descriptor)
            self._locked_files -= 1
