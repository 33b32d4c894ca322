"""Where a disk store lies, and whether what lies there can be trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import platformdirs

from ape_integrations.errors import StoreError

INDEX_FILE = "cache.db"


def default_directory() -> Path:
    """Return the user's cache directory for this package."""
    return Path(platformdirs.user_cache_dir("ape-integrations", appauthor=False)) / "kv"


def prepare_directory(directory: str | os.PathLike[str] | None, trust: bool = False) -> Path:
    """Create a store's directory, readable by its owner only, or check the one that exists.

    Parameters
    ----------
    directory : path or None
        None takes `default_directory`. ``~`` is expanded.
    trust : bool
        Accept a directory that somebody else owns or can write to.

    Returns
    -------
    Path
        The absolute path of a directory that is writable, or that holds a store at least.

    Raises
    ------
    StoreError
        If it cannot be created, if it is neither writable nor a store already, or if others
        could have planted entries in it.
    """
    path = Path(directory).expanduser() if directory is not None else default_directory()
    path = path.absolute()
    try:
        if not path.is_dir():
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Cannot create the store's directory {path}: {error.strerror}. Give another one,"
            " for example DiskKVStore(directory=...) or cache_dir=..., or make its parent writable."
        ) from error
    if not trust:
        _refuse_foreign(path)
    if not is_writable(path) and not (path / INDEX_FILE).exists():
        raise StoreError(
            f"The store's directory {path} is not writable. Give another one, for example"
            " DiskKVStore(directory=...) or cache_dir=..., or change its permissions."
        )
    return path


def permissions_for(path: Path, trust: bool) -> int:
    """Return the mode of new folders in a store's directory.

    States tell a lot about the text they were made from: they are for their owner alone, unless
    the directory is said to be shared; then its own mode says with whom.
    """
    return stat.S_IMODE(path.stat().st_mode) & 0o777 if trust else 0o700


def is_writable(path: Path) -> bool:
    """Tell whether this process can work in a directory."""
    return os.access(path, os.R_OK | os.W_OK | os.X_OK)


def _refuse_foreign(path: Path) -> None:
    """Raise StoreError where another user owns, or could write to, what is in the directory."""
    for item in (path, path / INDEX_FILE, path / "entries"):
        try:
            status = item.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StoreError(f"Cannot look into the store's directory {path}: {error}.") from error
        if status.st_uid != os.geteuid():
            raise StoreError(
                f"{item} belongs to another user (uid {status.st_uid}), who could plant wrong"
                " states in it. Use a directory of your own, or open it with"
                f" DiskKVStore({str(path)!r}, trust_directory=True) and pass that as the store."
            )
        shared_group = status.st_mode & stat.S_IWGRP and status.st_gid != status.st_uid
        if status.st_mode & stat.S_IWOTH or shared_group:
            raise StoreError(
                f"Other users can write to {item} and plant wrong states in it. Run"
                f" `chmod go-w {item}`, or open it with"
                f" DiskKVStore({str(path)!r}, trust_directory=True) and pass that as the store."
            )
