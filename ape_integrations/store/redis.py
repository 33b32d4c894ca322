"""A tier that several machines share: KV states on a Redis or Valkey server."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ape_integrations.errors import ConfigError, MissingDependencyError, StoreError
from ape_integrations.store import redis_scripts
from ape_integrations.store.base import (
    Destination,
    KVSpec,
    KVStates,
    LoadsByGet,
    StoreStats,
    check_destination,
    from_layers,
)
from ape_integrations.store.keys import KeySpace
from ape_integrations.store.outage import Outage
from ape_integrations.store.serialization import EntryError, deserialize, serialize
from ape_integrations.store.single_flight import EncodingLocks
from ape_integrations.store.sizes import parse_size

CHUNK_BYTES = 4 << 20
"""Bytes of one value on the server: large values block it and need large buffers on both sides."""

_UNREGISTERED_MS = 600_000
"""Life of chunks that never became an entry because their writer died."""


class RedisKVStore(LoadsByGet):
    """KV states on a Redis or Valkey server.

    A server that is down, slow or full means misses and states that are not stored, with one
    warning; it is tried again every few seconds. Whoever can write to the server can plant
    entries: give it a password, and a ``rediss://`` address where the network is not yours.

    Parameters
    ----------
    url : str
        For example ``"redis://:password@host:6379/0"``.
    ttl : float, optional
        Seconds after which an entry is removed.
    max_bytes : int or str, optional
        Bytes that all entries on the server may take together, least recently used first to go.
        Without it the server's own ``maxmemory`` and policy apply.
    kv_dtype, namespace : str
        As for `DiskKVStore`.
    timeout : float
        Seconds to wait for an answer of the server.
    retry_after : float
        Seconds until a server that failed is tried again.

    Raises
    ------
    ConfigError
        If a setting is out of range.
    MissingDependencyError
        If redis-py is not installed.
    """

    def __init__(
        self,
        url: str,
        ttl: float | None = None,
        max_bytes: int | str | None = None,
        *,
        kv_dtype: str = "auto",
        namespace: str = "",
        timeout: float = 2.0,
        retry_after: float = 5.0,
    ) -> None:
        if ttl is not None and ttl <= 0:
            raise ConfigError(f"ttl={ttl} must be a positive number of seconds, or None.")
        self._keys = KeySpace(namespace, kv_dtype)
        self._limit = parse_size(max_bytes, "max_bytes") if max_bytes is not None else None
        self._ttl_ms = int(ttl * 1000) if ttl is not None else 0
        self._client, self._faults = _connect(url, timeout)
        self._script = {
            name: self._client.register_script(getattr(redis_scripts, name))
            for name in ("REGISTER", "DROP", "TOUCH", "SWEEP")
        }
        self._outage = Outage("The Redis store", retry_after)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._pins: Counter[str] = Counter()
        self._encoding = EncodingLocks()

    def __repr__(self) -> str:
        # The address may hold a password.
        return f"RedisKVStore(max_bytes={self._limit})"

    def contains(self, key: str) -> bool:
        """Tell whether `key` is stored."""
        return bool(self._ask(self._client.exists, f"ape:entry:{self._keys.full(key)}"))

    def load(self, key: str, spec: KVSpec, destination: Destination) -> int | None:
        """Read an entry into memory that the caller owns; see `KVStore.load`."""
        check_destination(spec, destination)
        identity = self._keys.full(key)
        found = self._read(identity, spec, destination)
        self._count("hits" if found else "misses")
        if found is None:
            return None
        self._ask(self._script["TOUCH"], args=[identity])
        return found[0]

    def peek(self, key: str, spec: KVSpec) -> tuple[KVStates, str] | None:
        """Return an entry and its tag without counting a use, for tiers, as for `load`."""
        destination = spec.allocate()
        found = self._read(self._keys.full(key), spec, destination)
        return (from_layers(destination), found[1]) if found else None

    def touch(self, key: str) -> None:
        """Do nothing: a round trip for every hit of a faster tier would cost more than it gains."""

    def put(self, key: str, states: KVStates, *, tag: str = "") -> bool:
        """Store the states of one context; see `KVStore.put`."""
        stored = False
        identity = self._keys.full(key)
        if not self._outage.active:
            try:
                stored = self._write(identity, states, tag)
                self._outage.end()
            except ValueError as error:
                self._outage.note(f"an entry is not stored: {error}")
            except self._faults as error:
                self._outage.begin(error)
        if not stored:
            self._count("put_failures")
        return stored

    def pin(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Keep these entries from being evicted by this process inside a ``with`` block.

        Other clients may evict them: a loaded entry does not depend on the server any more.
        """
        return self._pin([self._keys.full(key) for key in keys])

    def encoding_lock(
        self, keys: str | Iterable[str], timeout: float = 0.0
    ) -> AbstractContextManager[frozenset[str]]:
        """Agree with the other threads on who encodes; see `KVStore.encoding_lock`."""
        return self._encoding.hold(keys, timeout)

    def delete(self, key: str) -> bool:
        """Remove an entry; False where there was none. StoreError where no server answers."""
        return bool(self._remove("DROP", self._keys.full(key)))

    def clear(self) -> int:
        """Remove all entries of this namespace and `kv_dtype`, and return their number.

        Raises
        ------
        StoreError
            Where no server answers.
        """
        return self._remove("SWEEP", self._keys.prefix, 1)

    def stats(self) -> StoreStats:
        """Return what the server holds for everybody, and this process's hits and misses."""
        self._ask(self._script["SWEEP"], args=["", 0])
        with self._lock:
            counts = Counter(self._counts)
        return StoreStats(
            entries=int(self._ask(self._client.zcard, "ape:order") or 0),
            bytes=int(self._ask(self._client.get, "ape:used") or 0),
            size_limit=self._limit,
            hits=counts["hits"],
            misses=counts["misses"],
            evictions=counts["evictions"],
            corrupted=counts["corrupted"],
            put_failures=counts["put_failures"],
        )

    def flush(self) -> None:
        """Do nothing: `put` returns when the server has the entry."""

    def close(self) -> None:
        """Close the connections. Using the store again opens new ones."""
        self._client.close()

    def _ask(self, command: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the server's answer, or None while it does not give one."""
        if self._outage.active:
            return None
        try:
            return command(*args, **kwargs)
        except self._faults as error:
            self._outage.begin(error)
            return None

    def _remove(self, script: str, *args: object) -> int:
        try:
            return int(self._script[script](args=args))
        except self._faults as error:
            raise StoreError(f"Nothing was removed from the Redis store: {error}.") from error

    def _read(
        self, identity: str, spec: KVSpec, destination: Destination
    ) -> tuple[int, str] | None:
        """Fill `destination`; return bytes and tag, or None for a miss."""
        fields = ["generation", "chunks", "size", "tag"]
        entry = self._ask(self._client.hmget, f"ape:entry:{identity}", fields)
        if not entry or entry[0] is None:
            return None
        try:
            source = _Chunks(self._client, identity, entry[0].decode(), int(entry[2]))
            nbytes = deserialize(source, identity, spec, destination, self._keys.kv_dtype)
            self._outage.end()
            return nbytes, entry[3].decode(errors="replace")
        except (EntryError, ValueError, TypeError, AttributeError) as error:
            # An entry that was replaced or evicted while it was read looks damaged too; dropping
            # it costs no more than encoding it again.
            self._ask(self._script["DROP"], args=[identity])
            self._count("corrupted")
            self._outage.note(f"dropped entry {identity}: {error}")
        except self._faults as error:
            self._outage.begin(error)
        return None

    def _write(self, identity: str, states: KVStates, tag: str) -> bool:
        buffers = serialize(identity, states, self._keys.kv_dtype)
        nbytes = sum(len(buffer) for buffer in buffers)
        if self._limit is not None and nbytes > self._limit:
            return False
        generation, count = secrets.token_hex(8), 0
        for count, chunk in enumerate(_chunked(buffers), 1):
            name = f"ape:chunk:{identity}:{generation}:{count - 1}"
            self._client.set(name, chunk, px=_UNREGISTERED_MS)
        with self._lock:
            pinned = list(self._pins)
        evicted = int(
            self._script["REGISTER"](
                args=[
                    *(identity, generation, count, nbytes, tag[:200]),
                    *(self._ttl_ms, self._limit or 0, *pinned),
                ]
            )
        )
        self._count("evictions", max(evicted, 0))
        return evicted >= 0

    def _count(self, name: str, value: int = 1) -> None:
        with self._lock:
            self._counts[name] += value

    @contextmanager
    def _pin(self, identities: list[str]) -> Iterator[None]:
        with self._lock:
            self._pins.update(identities)
        try:
            yield
        finally:
            with self._lock:
                self._pins.subtract(identities)
                self._pins = +self._pins


class _Chunks:
    """The bytes of an entry on a server, fetched chunk by chunk: a `serialization.Source`."""

    def __init__(self, client: Any, identity: str, generation: str, nbytes: int) -> None:
        self._client = client
        self._name = f"ape:chunk:{identity}:{generation}"
        self._next = 0
        self._rest = memoryview(b"")
        self.nbytes = nbytes

    def readinto(self, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers with the next bytes; EntryError where a chunk is missing."""
        for buffer in buffers:
            while len(buffer):
                if not self._rest:
                    self._fetch()
                count = min(len(buffer), len(self._rest))
                buffer[:count] = self._rest[:count]
                buffer, self._rest = buffer[count:], self._rest[count:]

    def _fetch(self) -> None:
        chunk = self._client.get(f"{self._name}:{self._next}")
        if not chunk:
            raise EntryError(f"lacks chunk {self._next}")
        self._rest = memoryview(chunk)
        self._next += 1


def _chunked(buffers: Sequence[memoryview]) -> Iterator[bytes]:
    """Join buffers into chunks of `CHUNK_BYTES`."""
    chunk = bytearray()
    for buffer in buffers:
        while len(buffer):
            room = CHUNK_BYTES - len(chunk)
            chunk += buffer[:room]
            buffer = buffer[room:]
            if len(chunk) == CHUNK_BYTES:
                yield bytes(chunk)
                chunk.clear()
    if chunk:
        yield bytes(chunk)


def _connect(url: str, timeout: float) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return a client, which connects when it is first used, and the faults it may raise."""
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise MissingDependencyError(
            "RedisKVStore needs redis-py: pip install 'ape-integrations[redis]'."
        ) from error
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            # Waiting and trying again costs more than encoding the context.
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise ConfigError(f"{error} (the address of the Redis server)") from error
    return client, (redis.RedisError, OSError, MemoryError)
