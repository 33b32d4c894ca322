"""Entry files in a store's directory: created locked, read in place, removed unless in use.

``flock`` says who uses a file: the writer of an entry that is not in the index yet holds it
exclusively, who pins an entry holds it shared. Such locks vanish with the process that held them,
so that a killed process leaves nothing behind that others would have to wait for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ape_integrations.store.serialization import EntryError

_NAME = re.compile(r"entries/[0-9a-f]{2}/[0-9a-f]{30}\.kv")
# A name that turned into a pipe must not block its reader.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
MAX_RESERVE = 1 << 30
"""Bytes that are left free on the file system: one percent of it, but no more than this."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_FILE_OF_OURS = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)

_MAX_BUFFERS = min(1024, os.sysconf("SC_IOV_MAX"))


def is_entry_name(name: object) -> bool:
    """Tell whether `name` is a relative path that this module could have made.

    The index is a file that others may have written to: no other path is ever opened or removed.
    """
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; False where somebody else holds it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock_and_close(descriptor: int) -> None:
    """Give up a lock at once, even where a forked process inherited the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


class NewFile:
    """An entry file that is being written, locked and unknown to the index.

    Parameters
    ----------
    name : str
        Path relative to the store's directory.
    descriptor : int
        Open for writing; owned by this object.
    path : Path
        Where it lies.
    """

    def __init__(self, name: str, descriptor: int, path: Path) -> None:
        self.name = name
        self._descriptor = descriptor
        self._path = path
        self._kept = False

    def write(self, buffers: Sequence[memoryview]) -> int:
        """Write all buffers and return the number of bytes."""
        total = sum(len(buffer) for buffer in buffers)
        pending = [buffer for buffer in buffers if len(buffer)]
        while pending:
            written = os.writev(self._descriptor, pending[:_MAX_BUFFERS])
            pending = _after(pending, written)
        return total

    def keep(self) -> None:
        """Leave the file in place: the index knows it now."""
        self._kept = True

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._kept:
            with contextlib.suppress(OSError):
                self._path.unlink()
        unlock_and_close(self._descriptor)


class OpenFile:
    """An entry file open for reading: a `serialization.Source`.

    Parameters
    ----------
    descriptor : int
        Open for reading; owned by this object.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.nbytes = os.fstat(descriptor).st_size
        self._offset = 0

    def readinto(self, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers with the next bytes; EntryError where the file ends before."""
        pending = [buffer for buffer in buffers if len(buffer)]
        while pending:
            count = os.preadv(self._descriptor, pending[:_MAX_BUFFERS], self._offset)
            if count == 0:
                raise EntryError("ends early")
            self._offset += count
            pending = _after(pending, count)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)


class EntryFiles:
    """The files of one store.

    Parameters
    ----------
    directory : Path
        The store's directory.
    permissions : int
        Mode of new folders; files get the same without the right to execute.
    """

    def __init__(self, directory: Path, permissions: int = 0o700) -> None:
        self._directory = directory
        self._permissions = permissions

    def path(self, name: str) -> Path:
        """Return where an entry file lies; ValueError for a name that is not ours."""
        if not is_entry_name(name):
            raise ValueError(f"{name!r} is not an entry file")
        return self._directory / name

    def create(self) -> NewFile:
        """Create a file for a new entry and lock it."""
        while True:
            digits = secrets.token_hex(16)
            name = f"entries/{digits[:2]}/{digits[2:]}.kv"
            path = self.path(name)
            self._make_folder(path.parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = self._open(name, flags)
            os.fchmod(descriptor, self._permissions & 0o666)
            # Between the two calls somebody may have taken the file for abandoned and removed it.
            if try_lock(descriptor) and os.fstat(descriptor).st_nlink == 1:
                return NewFile(name, descriptor, path)
            os.close(descriptor)

    def _make_folder(self, path: Path) -> None:
        if path.is_dir():
            return
        for folder in (path.parent, path):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                folder.chmod(self._permissions)

    def open(self, name: str) -> OpenFile:
        """Open an entry file for reading; OSError where it or its folder is a link, or absent."""
        return OpenFile(self._open(name, _READ))

    def pin(self, name: str) -> int | None:
        """Lock an entry file against removal by any process until the descriptor is closed.

        Returns
        -------
        int or None
            A descriptor for `unlock_and_close`; None where the file is gone or going.
        """
        try:
            descriptor = self._open(name, _READ)
        except OSError:
            return None
        if try_lock(descriptor, shared=True) and os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)
        return None

    def remove(self, name: str) -> bool:
        """Remove a file whatever its use; False where it was not there."""
        path = self.path(name)
        try:
            with _folder(path) as folder:
                os.unlink(path.name, dir_fd=folder)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def is_used(self, name: str) -> bool:
        """Tell whether a file is pinned or being written."""
        descriptor = self._open_present(name)
        if descriptor is None:
            return False
        try:
            return not try_lock(descriptor)
        finally:
            unlock_and_close(descriptor)

    def remove_unused(self, name: str) -> bool:
        """Remove a file unless it is pinned or being written; True when it is gone."""
        descriptor = self._open_present(name)
        if descriptor is None:
            return True
        try:
            if not try_lock(descriptor):
                return False
            self.remove(name)
            return True
        finally:
            unlock_and_close(descriptor)

    def is_abandoned(self, name: str, is_indexed: Callable[[str], bool], *, remove: bool) -> bool:
        """Tell whether a file belongs to no entry and nobody is writing it, and remove it if so.

        Parameters
        ----------
        name : str
            The file.
        is_indexed : callable
            Tells whether an entry has the file; asked while the file is locked, when no writer can
            register it any more.
        remove : bool
            Whether to remove it.
        """
        try:
            descriptor = self._open(name, _READ)
        except OSError:
            return False
        if not try_lock(descriptor):
            os.close(descriptor)
            return False
        try:
            abandoned = not is_indexed(name)
            if abandoned and remove:
                self.remove(name)
            return abandoned
        finally:
            unlock_and_close(descriptor)

    def require_room(self, nbytes: int) -> None:
        """Raise OSError (ENOSPC) where writing so many bytes would all but fill the file system."""
        system = os.statvfs(self._directory)
        reserve = min(MAX_RESERVE, system.f_blocks * system.f_frsize // 100)
        if system.f_bavail * system.f_frsize < nbytes + reserve:
            raise OSError(errno.ENOSPC, "the file system is full", str(self._directory))

    def names(self) -> Iterator[str]:
        """Yield the names of all entry files that exist."""
        for folder in sorted((self._directory / "entries").glob("[0-9a-f][0-9a-f]")):
            if folder.is_symlink():
                continue
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
                for item in found:
                    name = f"entries/{folder.name}/{item.name}"
                    if is_entry_name(name):
                        yield name

    def _open(self, name: str, flags: int) -> int:
        path = self.path(name)
        with _folder(path) as folder:
            return os.open(path.name, flags, 0o600, dir_fd=folder)

    def _open_present(self, name: str) -> int | None:
        """Open a file for reading; None where it is absent or a link stands in its place."""
        try:
            return self._open(name, _READ)
        except OSError as error:
            if error.errno in _NO_FILE_OF_OURS:
                return None
            raise


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    """Open the folder of an entry file, which must not be a link, for calls relative to it."""
    descriptor = os.open(path.parent, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of the buffers after `count` bytes went through."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []
