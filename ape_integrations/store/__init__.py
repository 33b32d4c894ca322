"""Key/value states by content hash: in memory, on disk, on a Redis server, or tiers of these."""

from __future__ import annotations

import os

from ape_integrations.errors import ConfigError
from ape_integrations.store.base import (
    Destination,
    KVSpec,
    KVStates,
    KVStore,
    LayerSpec,
    StoreStats,
    TagStats,
)
from ape_integrations.store.disk import DiskKVStore
from ape_integrations.store.memory import MemoryKVStore
from ape_integrations.store.redis import RedisKVStore
from ape_integrations.store.tiered import TieredKVStore

__all__ = [
    "Destination",
    "DiskKVStore",
    "KVSpec",
    "KVStates",
    "KVStore",
    "LayerSpec",
    "MemoryKVStore",
    "RedisKVStore",
    "StoreStats",
    "TagStats",
    "TieredKVStore",
    "open_store",
]

DEFAULT_MEMORY = "1GB"
"""Budget of the memory tier that `open_store` puts in front of a directory."""


def check_store(store: object) -> None:
    """Refuse what is no store and no directory, before anything is opened or loaded.

    Raises
    ------
    ConfigError
        It is neither a store, a path nor None.
    """
    if store is not None and not isinstance(store, (KVStore, str, os.PathLike)):
        raise ConfigError(
            "store must be a KVStore, such as a MemoryKVStore or a DiskKVStore, or a directory, "
            f"not {type(store).__name__}."
        )


def open_store(store: KVStore | str | os.PathLike[str] | None = None) -> KVStore:
    """Turn what a user gave as ``store`` or ``cache_dir`` into a store.

    Parameters
    ----------
    store : KVStore, path or None
        A store is returned as it is. A path, or None for the default directory, becomes a disk
        store with a memory tier of `DEFAULT_MEMORY` in front.

    Returns
    -------
    KVStore
        The store.

    Raises
    ------
    ConfigError
        It is neither a store, a path nor None.
    StoreError
        If the directory cannot be used.
    """
    check_store(store)
    if store is None or isinstance(store, (str, os.PathLike)):
        return TieredKVStore(MemoryKVStore(DEFAULT_MEMORY), DiskKVStore(store))
    return store
