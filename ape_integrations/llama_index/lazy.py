"""A generator that is loaded when it is first needed, and what reaches it before that."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ape_integrations.core.config import APEConfig
from ape_integrations.core.loading import (
    bundled_model,
    clear_loading_errors,
    place_of,
    usable_device_map,
)
from ape_integrations.core.prompt import PromptParts
from ape_integrations.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ape_integrations.core.generator import APEGenerator
    from ape_integrations.store import KVStore

logger = logging.getLogger(__name__)

#: Registrations kept for a model that is not loaded yet.
_KEPT = 1000

#: Retrievals whose prompt has not been seen yet.
_AWAITED = 16

#: Windows of context that a synthesizer may put into one prompt, where contexts share positions.
_PACKED = 4


@dataclass(frozen=True)
class Source:
    """Where model, tokenizer and store come from.

    Parameters
    ----------
    model_name, tokenizer_name : str or None
        Hub names or directories. No model name and no model means the bundled demo model.
    model, tokenizer
        Loaded objects, used instead of the names.
    device_map
        As transformers takes it; "auto" is left out on a machine without an accelerator.
    store : KVStore, str, Path or None
        As for ``APEGenerator``.
    config : APEConfig
        T, S and the limits of encoding.
    """

    model_name: str | None = None
    tokenizer_name: str | None = None
    model: Any = None
    tokenizer: Any = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    device_map: Any = None
    store: KVStore | str | Path | None = None
    config: APEConfig = field(default_factory=APEConfig)

    @property
    def is_portable(self) -> bool:
        """Whether another process can load the same from names alone."""
        loaded = (self.model, self.tokenizer)
        by_name = self.store is None or isinstance(self.store, (str, Path))
        return by_name and all(part is None for part in loaded)

    @property
    def loaded_name(self) -> str | None:
        """Name of a model that was given loaded."""
        if self.model is None:
            return None
        return self.model.config.name_or_path or type(self.model).__name__


Scores = Mapping[str, float] | None


@dataclass
class Pipeline:
    """What is known about the prompts that a pipeline builds around what it retrieved.

    Parameters
    ----------
    prefix : str or None
        The prefix of its latest prompt; None before the first.
    labelled : bool
        Whether the prompt puts labels to the texts, so that the bare texts are no contexts.
    """

    prefix: str | None = None
    labelled: bool = False


class LazyGenerator:
    """Loads an ``APEGenerator`` on first use, once, whoever asks first. Thread-safe.

    Parameters
    ----------
    source : Source
        What to load.
    generator : APEGenerator, optional
        A loaded one, used as it is.
    capture : bool
        Whether texts that LlamaIndex's instrumentation reports are registered here.
    """

    def __init__(
        self, source: Source, generator: APEGenerator | None = None, *, capture: bool = True
    ) -> None:
        self.source = source
        self.capture = capture
        self._generator = generator
        self._tokenizer: Any = generator.tokenizer if generator else source.tokenizer
        self._max_positions: list[int | None] = []
        self._lock = threading.RLock()  # loading, which takes long
        self._notes = threading.Lock()  # what is noted meanwhile
        self._pending: deque[tuple[tuple[str, ...], str | None, Scores]] = deque(maxlen=_KEPT)
        self._awaited: deque[tuple[Pipeline, frozenset[str]]] = deque(maxlen=_AWAITED)
        self._loading: threading.Thread | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyGenerator:
        """Return itself: copies of an LLM share one model."""
        return self

    # Loading ------------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._generator is not None

    def get(self) -> APEGenerator:
        """Return the generator; load it where that has not happened yet.

        Raises
        ------
        ConfigError
            The model or its tokenizer cannot be found.
        UnsupportedModelError
            APE cannot serve the model.
        StoreError
            The store cannot be opened.
        """
        if self._generator is None:
            with self._lock:
                if self._generator is None:
                    generator = self._load()
                    self._tokenizer = generator.tokenizer
                    with self._notes:
                        for noted in self._pending:
                            generator.registry.register(*noted)
                        self._pending.clear()
                        self._generator = generator
        return self._generator

    def load_in_background(self, then: Callable[[], None] | None = None) -> None:
        """Start loading; a failure shows when the model is used."""

        def load() -> None:
            try:
                self.get()
                if then is not None:
                    then()
            except Exception:
                logger.debug("Loading in the background failed", exc_info=True)

        with self._lock:
            if self._loading is None or not self._loading.is_alive():
                self._loading = threading.Thread(target=load, name="ape-load", daemon=True)
                self._loading.start()

    def _load(self) -> APEGenerator:
        from ape_integrations.core.generator import APEGenerator

        source = self.source
        tokenizer = self.tokenizer()
        if source.model is not None:
            return APEGenerator(source.model, tokenizer, source.store, source.config)
        kwargs = dict(source.model_kwargs)
        if (device_map := usable_device_map(source.device_map)) is not None:
            kwargs.setdefault("device_map", device_map)
        name = self._location()
        return APEGenerator.from_pretrained(
            name, store=source.store, config=source.config, tokenizer=tokenizer, **kwargs
        )

    def _location(self) -> str:
        return bundled_model() if self.source.model_name is None else self.source.model_name

    # What can be known without loading the model --------------------------------------------------

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, which needs no model."""
        if self._tokenizer is None:
            with self._lock:
                if self._tokenizer is None:
                    self._tokenizer = self._load_tokenizer()
        tokenizer: PreTrainedTokenizerBase = self._tokenizer
        return tokenizer

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        source = self.source
        name = source.tokenizer_name
        if name is None and source.model is not None:
            name = source.model.config.name_or_path
            if not name:
                raise ConfigError("A model was given without a tokenizer: pass tokenizer=... too.")
        name = name or self._location()
        own = source.tokenizer_name is None
        kwargs = {**(place_of(source.model_kwargs) if own else {}), **source.tokenizer_kwargs}
        with clear_loading_errors(name):
            return AutoTokenizer.from_pretrained(name, **kwargs)

    def max_positions(self) -> int | None:
        """Return the model's position limit in tokens, read from its config alone."""
        if not self._max_positions:
            from ape_integrations.core.model import max_positions

            text = self._config().get_text_config(decoder=True)
            self._max_positions.append(max_positions(text))
        return self._max_positions[0]

    def packed_window(self, window: int) -> int:
        """Return the tokens of one prompt, contexts included; loads the model.

        Parameters
        ----------
        window : int
            Those of a model whose contexts do not share positions.
        """
        return max(window, min(_PACKED * window, self.get().context_room or 0))

    def _config(self) -> Any:
        if self._generator is not None:
            return self._generator.model.config
        if self.source.model is not None:
            return self.source.model.config
        from transformers import AutoConfig

        name = self._location()
        given = self.source.model_kwargs
        further = {k: given[k] for k in ("subfolder", "code_revision") if k in given}
        with clear_loading_errors(name):
            return AutoConfig.from_pretrained(name, **place_of(given), **further)

    # Retrieved texts ------------------------------------------------------------------------------

    def register(
        self, texts: Iterable[str], query: str | None = None, scores: Scores = None
    ) -> None:
        """Hand retrieved texts, query and scores to the model's registry, now or on loading."""
        kept = tuple(texts)
        with self._notes:
            if self._generator is None:
                self._pending.append((kept, query, scores))
            else:
                self._generator.registry.register(kept, query, scores)

    def expect(self, pipeline: Pipeline, texts: Sequence[str]) -> None:
        """Tell a pipeline what the next prompt with one of these texts looks like."""
        with self._notes:
            self._awaited.append((pipeline, frozenset(text.strip() for text in texts)))

    def split(self, prompt: str) -> PromptParts:
        """Split a rendered prompt, and tell the pipelines that were waiting for it."""
        parts = self.get().split(prompt)
        contexts = {text.strip() for text in parts.contexts}
        with self._notes:
            awaited = list(self._awaited) if contexts else []
            for pipeline, texts in awaited:
                bare = not contexts.isdisjoint(texts)
                if bare or any(text in context for text in texts for context in contexts):
                    pipeline.prefix, pipeline.labelled = parts.prefix, not bare
                    self._awaited.remove((pipeline, texts))
        return parts
