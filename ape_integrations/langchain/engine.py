"""The generator behind a LangChain model: loaded when first needed, shared by models alike."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ape_integrations.core.config import APEConfig
from ape_integrations.core.fingerprint import ModelFingerprint
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.loading import bundled_model, usable_device_map
from ape_integrations.core.model import model_name
from ape_integrations.store import KVStore

#: Retrievals remembered for a model that is not loaded yet, or not even named.
_MAX_PENDING = 256

#: Engines kept for the configured copies of a model, each of which lives for one call.
_MAX_CONFIGURED = 4

Retrieval = tuple[list[str], str | None, Mapping[str, float] | None]

_engines: WeakValueDictionary[Hashable, Engine] = WeakValueDictionary()
_recent: deque[Retrieval] = deque(maxlen=_MAX_PENDING)
_engines_lock = threading.Lock()
# One engine loads at a time, so that the next one finds its model.
_loading_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that the user loaded: a whole generator, or model and tokenizer.

    Parameters
    ----------
    generator : APEGenerator, optional
    model : PreTrainedModel, optional
    tokenizer : PreTrainedTokenizerBase, optional
    """

    generator: APEGenerator | None = None
    model: Any = None
    tokenizer: Any = None

    @property
    def parts(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        if self.generator is not None:
            return self.generator.model, self.generator.tokenizer
        return self.model, self.tokenizer

    @property
    def name(self) -> str:
        """Name of the model, as far as it knows it."""
        return model_name(self.parts[0])

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """Identity of the weights, which notices when they change."""
        return ModelFingerprint(self.parts[0])

    @property
    def identity(self) -> tuple[int, int, int]:
        """Which objects these are, for as long as they live."""
        return id(self.generator), id(self.model), id(self.tokenizer)


@dataclass(frozen=True)
class EngineSettings:
    """Everything that decides which generator serves a LangChain model.

    Parameters
    ----------
    model : str or None
        Hub name or directory; None is the bundled demo model.
    loaded : LoadedModel or None
        Used instead of loading ``model``.
    store : KVStore, str or None
        Where states are kept.
    config : APEConfig
        T, S and the limits of encoding.
    load_kwargs : dict
        For ``from_pretrained``.
    capture : bool
        Whether retrieved documents are registered automatically.
    """

    model: str | None = None
    loaded: LoadedModel | None = None
    store: KVStore | str | None = None
    config: APEConfig = field(default_factory=APEConfig)
    load_kwargs: dict[str, Any] = field(default_factory=dict)
    capture: bool = True

    @property
    def key(self) -> Hashable:
        """Equal for settings that one generator can serve."""
        store = _resolved(self.store) if isinstance(self.store, str) else id(self.store)
        return (
            _resolved(self.model) if self.model and Path(self.model).exists() else self.model,
            self.loaded and self.loaded.identity,
            store if self.store is not None else None,
            self.config,
            repr(sorted(self.load_kwargs.items())),
            self.capture,
        )

    @property
    def weights(self) -> Hashable:
        """The part of the key that decides which model is loaded."""
        key: tuple[Hashable, ...] = self.key  # type: ignore[assignment]
        return key[0], key[1], key[4]

    def load(self) -> APEGenerator:
        """Return the generator, which takes as long as loading the model takes.

        Engines that differ in other settings share one model in memory.
        """
        if self.loaded is not None and self.loaded.generator is not None:
            return self.loaded.generator
        parts = self.loaded.parts if self.loaded is not None else _loaded_parts(self)
        if parts is not None:
            return APEGenerator(*parts, store=self.store, config=self.config)
        kwargs = dict(self.load_kwargs)
        device_map = usable_device_map(kwargs.pop("device_map", "auto"))
        if device_map is not None:
            kwargs["device_map"] = device_map
        name = bundled_model() if self.model is None else self.model
        return APEGenerator.from_pretrained(name, store=self.store, config=self.config, **kwargs)


class Engine:
    """A generator that is loaded when it is first used. Safe for many threads.

    Documents retrieved before that are registered as soon as it is there.

    Parameters
    ----------
    settings : EngineSettings
    earlier : sequence of Retrieval
        What was retrieved before there was this engine.
    """

    def __init__(self, settings: EngineSettings, earlier: Sequence[Retrieval] = ()) -> None:
        self.settings = settings
        self._generator: APEGenerator | None = None
        self._pending = deque(earlier, maxlen=_MAX_PENDING)
        self._lock = threading.Lock()

    @property
    def generator(self) -> APEGenerator:
        """The generator; the first use loads the model."""
        if self._generator is None:
            with _loading_lock:
                if self._generator is None:
                    generator = self.settings.load()
                    with self._lock:
                        self._generator = generator
                        while self._pending:
                            generator.registry.register(*self._pending.popleft())
        return self._generator

    @property
    def parts(self) -> tuple[Any, Any] | None:
        """Model and tokenizer, where they are loaded."""
        generator = self._generator
        return None if generator is None else (generator.model, generator.tokenizer)

    def register(
        self,
        texts: Sequence[str],
        query: str | None = None,
        scores: Mapping[str, float] | None = None,
        *,
        again: bool = True,
    ) -> None:
        """Note retrieved texts, and start fetching their states where the model is loaded.

        Parameters
        ----------
        texts : sequence of str
            Texts as the prompt will contain them.
        query : str, optional
            What they were retrieved for.
        scores : mapping of str to float, optional
            Their retrieval scores by text, by which ``APEConfig.max_contexts`` chooses.
        again : bool
            Whether to do so with texts that are known already, and to fetch their states.
        """
        with self._lock:
            if self._generator is None:
                if again or not _holds(self._pending, texts, query):
                    self._pending.append((list(texts), query, scores))
                return
        if not again and self._generator.registry.knows(texts):
            texts = ()
        self._generator.registry.register(texts, query, scores)
        if again:
            self._generator.prefetch(texts, encode=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return acquire, (self.settings,)


class EnginePool:
    """Engines that one model's configured copies used last, so that the next copy finds them."""

    def __init__(self) -> None:
        self._engines: OrderedDict[Hashable, Engine] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, engine: Engine) -> None:
        """Hold an engine; the least recently used one is let go."""
        with self._lock:
            self._engines[engine.settings.key] = engine
            self._engines.move_to_end(engine.settings.key)
            while len(self._engines) > _MAX_CONFIGURED:
                self._engines.popitem(last=False)

    def __eq__(self, other: object) -> bool:
        # Models with equal settings are equal, whatever copies were made of them.
        return isinstance(other, EnginePool)

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> EnginePool:
        return EnginePool()

    def __reduce__(self) -> tuple[Any, ...]:
        return EnginePool, ()


def acquire(settings: EngineSettings) -> Engine:
    """Return the engine of these settings: one per process, as long as somebody holds it."""
    with _engines_lock:
        engine = _engines.get(settings.key)
        if engine is None:
            engine = Engine(settings, _recent if settings.capture else ())
            _engines[settings.key] = engine
        return engine


def register_everywhere(
    texts: Sequence[str],
    query: str | None,
    scores: Mapping[str, float] | None,
    *,
    again: bool = True,
) -> None:
    """Note what was retrieved for every engine that wants it, later ones included.

    Parameters
    ----------
    texts, query, scores, again
        As for :meth:`Engine.register`.
    """
    with _engines_lock:
        if again or not _holds(_recent, texts, query):
            _recent.append((list(texts), query, scores))
        wanting = [engine for engine in _engines.values() if engine.settings.capture]
    for engine in wanting:
        engine.register(texts, query, scores, again=again)


def _holds(retrievals: Iterable[Retrieval], texts: Sequence[str], query: str | None) -> bool:
    wanted = list(texts)
    return any(known == wanted and query in (None, asked) for known, asked, _ in retrievals)


def engines() -> list[Engine]:
    """Return all engines that somebody holds."""
    with _engines_lock:
        return list(_engines.values())


def _loaded_parts(settings: EngineSettings) -> tuple[Any, Any] | None:
    """Return the model and tokenizer of settings where another engine has loaded them."""
    alike = (engine.parts for engine in engines() if engine.settings.weights == settings.weights)
    return next((parts for parts in alike if parts is not None), None)


def _resolved(path: str) -> str:
    return str(Path(path).expanduser().resolve())
