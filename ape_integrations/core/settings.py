"""Arguments of a generation: checked, completed, and turned into those of ``model.generate()``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from ape_integrations.core.generation import Cancellation, SeededSampler
from ape_integrations.errors import ConfigError

#: Arguments of ``model.generate()`` that describe the prompt, which the generator owns.
_OWNED = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_implementation",
    "return_dict_in_generate",
)


class GenerationSettings:
    """The settings of one generation.

    Parameters
    ----------
    kwargs : dict
        What the caller passed: arguments of ``model.generate()``, ``stop`` and ``seed``.
    defaults : GenerationConfig
        The model's own.
    max_new_tokens : int
        Tokens to generate where neither says.

    Attributes
    ----------
    max_new_tokens : int
        Tokens to generate at most.
    stop : list of str
        Strings to stop before.
    single : bool
        One sequence is generated token by token, as opposed to beams.
    sampler : SeededSampler or None
        Chooses the tokens where a seed was given.
    cancellations : list of Cancellation
        What may stop this generation and no other in its batch.
    kwargs : dict
        For ``model.generate()``.

    Raises
    ------
    ConfigError
        An argument cannot be combined with cached contexts, or is out of range.
    """

    def __init__(
        self, kwargs: dict[str, Any], defaults: GenerationConfig, max_new_tokens: int
    ) -> None:
        _refuse(kwargs)
        self.kwargs = dict(kwargs)
        self._config = kwargs.get("generation_config") or defaults
        self.stop = _strings(self.kwargs.pop("stop", None))
        self.single = (self._value("num_beams") or 1) == 1
        self.max_new_tokens = self._whole("max_new_tokens", max_new_tokens)
        self.kwargs["max_new_tokens"] = self.max_new_tokens
        self.sampler = self._take_seed()
        criteria = list(self.kwargs.pop("stopping_criteria", None) or [])
        self.cancellations = [c for c in criteria if isinstance(c, Cancellation)]
        if others := [c for c in criteria if not isinstance(c, Cancellation)]:
            self.kwargs["stopping_criteria"] = others
        if self._value("pad_token_id") is None:
            # Padding never happens, but transformers warns where no token is named.
            self.kwargs["pad_token_id"] = next(iter(self.end_tokens), 0)

    def _value(self, name: str) -> Any:
        return self.kwargs.get(name, getattr(self._config, name, None))

    def _whole(self, name: str, default: int) -> int:
        value = self._value(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {value}.")
        return value

    @property
    def draftable(self) -> bool:
        """Whether tokens are chosen one by one, greedily or sampled, with nobody watching."""
        plain = GenerationConfig()
        other = ("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "guidance_scale")
        return (
            self.single
            and self.kwargs.get("streamer") is None
            and all(self._value(name) in (None, getattr(plain, name, None)) for name in other)
            and "custom_generate" not in self.kwargs
        )

    @property
    def shared(self) -> Hashable | None:
        """What settings must have in common to run as one batch; None for those that run alone.

        Stop strings, seeds and cancellations are kept apart by sequence. Whatever may look at a
        sequence as a whole, padding included, or hold a state of its own, runs alone.
        """
        if not self.draftable or self._value("no_repeat_ngram_size"):
            return None
        try:
            return tuple(sorted((name, _frozen(value)) for name, value in self.kwargs.items()))
        except TypeError:
            return None

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a sequence."""
        return _as_list(self._value("eos_token_id"))

    def _take_seed(self) -> SeededSampler | None:
        """Replace seeded sampling by a sampler with a random generator of its own."""
        seed = self.kwargs.pop("seed", None)
        if seed is None or not self._value("do_sample"):
            return None
        names = ("temperature", "top_k", "top_p", "min_p")
        settings = {name: self._value(name) for name in names}
        if settings["temperature"] is None:
            settings["temperature"] = 1.0
        # Greedy decoding warns of the settings of sampling, which the sampler has taken.
        self.kwargs.update(do_sample=False, **dict.fromkeys(names))
        return SeededSampler(seed, **settings)


def _refuse(kwargs: dict[str, Any]) -> None:
    owned = [name for name in _OWNED if name in kwargs]
    if owned:
        raise ConfigError(
            f"{', '.join(owned)} cannot be passed: the generator sets up prompt and cache itself. "
            "Pass prefix, contexts and query."
        )
    if "max_length" in kwargs:
        raise ConfigError(
            "max_length counts prompt tokens, which cached contexts make ambiguous. "
            "Use max_new_tokens."
        )
    if kwargs.get("num_return_sequences", 1) != 1:
        raise ConfigError("num_return_sequences must be 1: a result holds one text.")
    if kwargs.get("assistant_model") is not None:
        raise ConfigError("assistant_model is not supported together with cached contexts.")


def _frozen(value: Any) -> str:
    """Return a plain value as text that differs where the value does.

    Raises
    ------
    TypeError
        It is no number, string, or list of these.
    """
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_frozen, value))}]"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise TypeError(f"{type(value).__name__} may hold a state")


def _strings(stop: str | Sequence[str] | None) -> list[str]:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else [text for text in stop if text]


def _as_list(ids: int | list[int] | Tensor | None) -> list[int]:
    if ids is None:
        return []
    if isinstance(ids, Tensor):
        return [int(i) for i in ids.flatten()]
    return [ids] if isinstance(ids, int) else list(ids)
