"""States of prefixes and contexts: from the store where they are, from the encoder where not."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ape_integrations.core.context_sets import ContextSet, Layers
from ape_integrations.core.encoder import ContextEncoder
from ape_integrations.core.fingerprint import ModelFingerprint, entry_key
from ape_integrations.core.model import ModelInfo
from ape_integrations.core.threads import PassingExecutor
from ape_integrations.forks import forget_in_children
from ape_integrations.store import KVStates, KVStore

#: Prefixes whose states are kept in memory.
KEPT_PREFIXES = 4

#: Threads that read entries side by side, at least and at most; one alone is slower than memory.
_READERS = (2, 8)

#: Seconds to wait for a context that another process is encoding, before encoding it as well.
_PATIENCE = 30.0

#: Seconds of encoding after which a progress bar is worth its line.
_PROGRESS_DELAY = 3.0


@dataclass
class Figures:
    """What the cache did for one request; ``encoded`` in tokens, times in seconds.

    ``ready`` is when prefix and contexts stood ready, on the clock of ``start``.
    """

    hits: int = 0
    misses: int = 0
    encoded: int = 0
    bytes_loaded: int = 0
    reused: int = 0
    load: float = 0.0
    encode: float = 0.0
    select: float = 0.0
    recompute: float = 0.0
    first_token: float = 0.0
    start: float = field(default_factory=time.perf_counter)
    ready: float = 0.0

    def share(self, other: Figures, contexts: int) -> None:
        """Take over what ``other`` waited for; its misses and bytes are counted once, with it."""
        self.hits, self.load, self.encode = contexts, other.load, other.encode


@dataclass(frozen=True)
class _Missing:
    index: int
    key: str
    ids: Sequence[int]


class StateSource:
    """Finds KV states by content; each missing context is encoded once, whoever asks.

    Parameters
    ----------
    store : KVStore
        Keeps what was encoded.
    encoder : ContextEncoder
        Encodes what is missing.
    info : ModelInfo
        Shapes and dtype of the states.
    fingerprint : ModelFingerprint
        Identity of the model.
    """

    def __init__(
        self,
        store: KVStore,
        encoder: ContextEncoder,
        info: ModelInfo,
        fingerprint: ModelFingerprint,
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._info = info
        self._fingerprint = fingerprint
        self._prefixes: OrderedDict[str, Layers] = OrderedDict()
        fewest, most = _READERS
        readers = max(fewest, min(most, torch.get_num_threads() // 2))
        self._readers = PassingExecutor(readers, "ape-read")
        self.forget_other_threads()
        forget_in_children(self)

    def forget_other_threads(self) -> None:
        """Forget what other threads encode, which a forked process does not have."""
        self._lock = threading.Lock()
        self._encoding: dict[str, Future[KVStates]] = {}

    def keys(self, prefix_ids: Sequence[int], texts: Sequence[Sequence[int]]) -> list[str]:
        """Return the store keys of token ids behind ``prefix_ids``."""
        fingerprint = self._fingerprint.digest()
        return [entry_key(fingerprint, self._info.dtype, prefix_ids, ids) for ids in texts]

    def prefix(self, ids: Sequence[int], figures: Figures) -> Layers:
        """Return the states of a shared prefix: from memory, the store, or a forward pass.

        Returns
        -------
        list of (Tensor, Tensor)
            Per layer, keys and values ``(kv_heads, prefix_length, head_dim)`` on its device.
        """
        if not ids:
            return self._encoder.empty_prefix()
        [key] = self.keys([], [ids])
        with self._lock:
            if key in self._prefixes:
                self._prefixes.move_to_end(key)
                return self._prefixes[key]
        cost = Figures()
        states = self._encode([], [_Missing(0, key, ids)], cost)[0]
        figures.bytes_loaded += cost.bytes_loaded
        figures.encode += cost.encode
        layers = self._encoder.on_devices(states)
        with self._lock:
            self._prefixes[key] = layers
            while len(self._prefixes) > KEPT_PREFIXES:
                self._prefixes.popitem(last=False)
        return layers

    def fill(
        self,
        prefix_ids: Sequence[int],
        contexts: Sequence[Sequence[int]],
        keys: Sequence[str],
        target: ContextSet,
        figures: Figures,
    ) -> None:
        """Write the states of all contexts into ``target``, in order.

        Parameters
        ----------
        contexts : sequence of token ids
            One after the other in the buffer.
        keys : sequence of str
            Their store keys.
        figures : Figures
            Hits, misses, bytes and seconds are added here.
        """
        starts, total = [], 0
        for ids in contexts:
            starts.append(total)
            total += len(ids)

        def load(index: int) -> int | None:
            length = len(contexts[index])
            destination = target.destination(starts[index], length)
            return self._store.load(keys[index], self._info.spec(length), destination)

        began = time.perf_counter()
        loaded: list[int | None] = []
        there, complete = 0, True
        with self._store.pin(keys):
            for ids, size in zip(contexts, self._side_by_side(load, len(contexts)), strict=True):
                loaded.append(size)
                there, complete = there + len(ids), complete and size is not None
                if complete:
                    target.transfer.advance(there)
        figures.load += time.perf_counter() - began
        figures.bytes_loaded += sum(size or 0 for size in loaded)
        missing = [
            _Missing(index, keys[index], contexts[index])
            for index, size in enumerate(loaded)
            if size is None
        ]
        figures.hits += len(contexts) - len(missing)

        def place(index: int, states: KVStates) -> None:
            destination = target.destination(starts[index], len(contexts[index]))
            for (key_slot, value_slot), key, value in zip(
                destination, states.keys, states.values, strict=True
            ):
                key_slot.copy_(key)
                value_slot.copy_(value)

        self._encode(prefix_ids, missing, figures, place)

    def _side_by_side(self, load: Callable[[int], int | None], count: int) -> Iterator[int | None]:
        """Load contexts in several threads; here where the system has no thread left."""
        pending: list[Future[int | None]] = []
        for index in range(count):
            try:
                pending.append(self._readers.submit(load, index))
            except RuntimeError:
                pending.append(Future())
                pending[-1].set_result(load(index))
        for future in pending:
            yield future.result()

    def ensure(
        self,
        prefix_ids: Sequence[int],
        contexts: Sequence[Sequence[int]],
        figures: Figures,
        show_progress: bool | None = None,
    ) -> None:
        """Encode and store whatever the store lacks."""
        keys = self.keys(prefix_ids, contexts)
        missing = [
            _Missing(index, key, ids)
            for index, (key, ids) in enumerate(zip(keys, contexts, strict=True))
            if not self._store.contains(key)
        ]
        figures.hits += len(contexts) - len(missing)
        self._encode(prefix_ids, missing, figures, lambda *_: None, show_progress)

    def promote(self, prefix_ids: Sequence[int], contexts: Sequence[Sequence[int]]) -> None:
        """Bring stored states into the store's fastest tier."""
        for key, ids in zip(self.keys(prefix_ids, contexts), contexts, strict=True):
            self._store.get(key, self._info.spec(len(ids)))

    def _encode(
        self,
        prefix_ids: Sequence[int],
        missing: Sequence[_Missing],
        figures: Figures,
        place: Callable[[int, KVStates], None] | None = None,
        show_progress: bool | None = None,
    ) -> dict[int, KVStates]:
        """Encode, store and place what is missing; wait for what others are encoding.

        Returns
        -------
        dict
            States by index, where ``place`` is None.
        """
        kept: dict[int, KVStates] = {}
        if not missing:
            return kept
        place = place or kept.__setitem__
        began = time.perf_counter()
        prefix = self.prefix(prefix_ids, figures)
        while missing:
            own, others = self._claim(missing)
            if own:
                self._encode_own(prefix, own, figures, place, show_progress)
            retry = []
            for item, future in others:
                try:
                    place(item.index, future.result())
                    figures.hits += 1
                except Exception:
                    # Whoever was encoding it failed; that failure is theirs to report.
                    retry.append(item)
            missing = retry
        figures.encode += time.perf_counter() - began
        return kept

    def _claim(
        self, missing: Sequence[_Missing]
    ) -> tuple[list[_Missing], list[tuple[_Missing, Future[KVStates]]]]:
        own, others = [], []
        with self._lock:
            for item in missing:
                if item.key in self._encoding:
                    others.append((item, self._encoding[item.key]))
                else:
                    self._encoding[item.key] = Future()
                    own.append(item)
        return own, others

    def _encode_own(
        self,
        prefix: Layers,
        own: Sequence[_Missing],
        figures: Figures,
        place: Callable[[int, KVStates], None],
        show_progress: bool | None,
    ) -> None:
        """Encode what this thread claimed, except what another process stores meanwhile."""
        try:
            left = {item.key: item for item in own}
            # Nothing is held while waiting for others, so two processes cannot block each other.
            for patience in (0.0, _PATIENCE):
                if not left:
                    break
                with self._store.encoding_lock(left, patience) as mine:
                    turn = [key for key in left if key in mine or patience]
                    items = [left.pop(key) for key in turn]
                    items = self._look_again(items, figures, place)
                    self._encode_held(prefix, items, figures, place, show_progress)
        finally:
            for item in own:
                self._finish(item.key, None)

    def _look_again(
        self,
        items: Sequence[_Missing],
        figures: Figures,
        place: Callable[[int, KVStates], None],
    ) -> list[_Missing]:
        """Take what was stored between our look-up and our claim; return the rest."""
        missing = []
        for item in items:
            states = None
            if self._store.contains(item.key):
                states = self._store.get(item.key, self._info.spec(len(item.ids)))
            if states is None:
                missing.append(item)
                continue
            figures.hits += 1
            figures.bytes_loaded += states.nbytes
            self._finish(item.key, states)
            place(item.index, states)
        return missing

    def _encode_held(
        self,
        prefix: Layers,
        items: Sequence[_Missing],
        figures: Figures,
        place: Callable[[int, KVStates], None],
        show_progress: bool | None,
    ) -> None:
        if not items:
            return
        figures.misses += len(items)
        figures.encoded += sum(len(item.ids) for item in items)
        tag = self._tag()
        with tqdm(
            total=sum(len(item.ids) for item in items),
            desc="Encoding contexts",
            unit="tok",
            delay=0 if show_progress else _PROGRESS_DELAY,
            disable=None if show_progress is None else not show_progress,
            leave=bool(show_progress),
        ) as progress:
            for index, states in self._encoder.encode(prefix, [item.ids for item in items]):
                item = items[index]
                self._store.put(item.key, states, tag=tag)
                self._finish(item.key, states)
                place(item.index, states)
                progress.update(len(item.ids))

    def _finish(self, key: str, states: KVStates | None) -> None:
        """Tell those who wait for ``key``; without states, that its encoding failed."""
        with self._lock:
            future = self._encoding.pop(key, None)
        if future is None:
            return
        if states is None:
            future.set_exception(RuntimeError("encoding failed"))
        else:
            future.set_result(states)

    def _tag(self) -> str:
        return f"{Path(self._encoder.model_name).name}@{self._fingerprint.digest()[:12]}"
