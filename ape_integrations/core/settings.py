"""Arguments of a generation: checked, completed, and turned into those of ``model.generate()``."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from ape_integrations.core.generation import (
    SAMPLING,
    Cancellation,
    SeededSampler,
    listed,
    warpers,
)
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

#: Lengths that count the prompt, and what to use instead.
_LENGTHS = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}

#: What every generation has, whatever the model's own generation config says.
_ALWAYS = {
    "use_cache": True,
    "cache_implementation": None,
    "return_dict_in_generate": False,
    "num_return_sequences": 1,
    "token_healing": None,
}

#: Other ways to read several tokens at once, with the same outcome. Drafts from the contexts do so
#: here; these would read the whole prompt again behind the cache.
_DRAFTING = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")

#: Settings that count the tokens of a sequence, or look at several in a row, those of the prompt
#: and its padding included; and ways to decode that transformers has for one sequence alone.
_ALONE = (
    "min_length",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "watermarking_config",
    "streamer",
)

#: The fields of a generation config.
_FIELDS = {name for name in vars(GenerationConfig()) if name[0] != "_"} - {"transformers_version"}

#: What ``model.generate()`` falls back to where neither caller nor model say anything.
_FALLBACK: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()


class GenerationSettings:
    """The settings of one generation.

    Parameters
    ----------
    kwargs : dict
        What the caller passed: arguments of ``model.generate()``, ``stop`` and ``seed``. What a
        ``generation_config`` among them leaves open is as the model's own says.
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
    stop_strings : list of str
        Strings to stop behind.
    single : bool
        One sequence is generated token by token, as opposed to beams.
    alone : bool
        Only one sequence can be generated at a time: padding would change what comes out.
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
        self._defaults = defaults
        self.kwargs = _by_name(kwargs, defaults)
        _refuse(self.kwargs)
        self.kwargs.update(_overruled(defaults))
        self.kwargs.update(dict.fromkeys(_DRAFTING))
        self.stop = strings("stop", self.kwargs.pop("stop", None))
        self.stop_strings = strings("stop_strings", self._value("stop_strings"))
        if self.stop_strings:
            self.kwargs["stop_strings"] = None
        self.single = self._whole("num_beams", 1) == 1
        self.max_new_tokens = self._whole("max_new_tokens", max_new_tokens)
        self.kwargs["max_new_tokens"] = self.max_new_tokens
        self.alone = bool(self.stop_strings) or any(self._value(name) for name in _ALONE)
        self._check_temperature()
        self.sampler = self._take_seed()
        criteria = listed("stopping_criteria", self.kwargs.pop("stopping_criteria", None))
        self.cancellations = [c for c in criteria if isinstance(c, Cancellation)]
        if others := [c for c in criteria if not isinstance(c, Cancellation)]:
            self.kwargs["stopping_criteria"] = others
        if processors := listed("logits_processor", self.kwargs.pop("logits_processor", None)):
            self.kwargs["logits_processor"] = processors
        if self._value("pad_token_id") is None:
            # Padding never happens, but transformers warns where no token is named.
            self.kwargs["pad_token_id"] = next(iter(self.end_tokens), 0)

    def _value(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        value = getattr(self._defaults, name, None)
        return _FALLBACK.get(name) if value is None else value

    def _whole(self, name: str, default: int) -> int:
        value = self._value(name)
        value = default if value is None else value
        if not is_number(value, Integral) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")
        return int(value)

    @property
    def draftable(self) -> bool:
        """Whether tokens are chosen one by one, greedily or sampled, with nobody watching."""
        plain = GenerationConfig()
        other = ("penalty_alpha", "dola_layers", "guidance_scale", "constraints", "force_words_ids")
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
        if not self.draftable or self.alone:
            return None
        try:
            named = sorted((name, _frozen(value)) for name, value in self.kwargs.items())
        except TypeError:
            return None
        return self.sampler is not None, *named

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a sequence."""
        return _as_list(self._value("eos_token_id"))

    def _check_temperature(self) -> None:
        """Refuse a temperature that is none; 0 is greedy decoding, whatever else is set."""
        temperature = check_temperature(self._value("temperature"))
        if temperature == 0 or self.kwargs.get("do_sample") is False:
            self._decode_greedily()
        elif temperature is not None:
            self.kwargs["temperature"] = float(temperature)

    def _decode_greedily(self) -> None:
        # Greedy decoding warns of the settings of sampling.
        self.kwargs.update(do_sample=False, **dict.fromkeys(SAMPLING))

    def _take_seed(self) -> SeededSampler | None:
        """Replace seeded sampling by a sampler with a random generator of its own."""
        seed = self.kwargs.pop("seed", None)
        if seed is not None and (not is_number(seed, Integral) or not -(1 << 63) <= seed < 1 << 64):
            raise ConfigError(f"seed must be a whole number of at most 64 bits, not {seed!r}.")
        if not self._value("do_sample"):
            return None
        settings = {name: self._value(name) for name in SAMPLING}
        try:
            warpers(settings)
            config = GenerationConfig(watermarking_config=self._value("watermarking_config"))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"A setting of sampling is out of range: {error}") from error
        if seed is None:
            return None
        if not self.single:
            raise ConfigError("A seed is for one sequence, not for beams. Use num_beams=1.")
        self._decode_greedily()
        if config.watermarking_config is not None:
            self.kwargs["watermarking_config"] = None
        return SeededSampler(int(seed), settings, config.watermarking_config)


def _by_name(kwargs: Mapping[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """Return arguments in which those of the caller's generation config are passed by name.

    So they rank as in transformers: behind other arguments, before the model's own config.
    """
    kwargs = {
        name: value
        for name, value in kwargs.items()
        if value is not None or name not in ("num_beams", "num_return_sequences")
    }
    config = kwargs.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise ConfigError(f"generation_config must be a GenerationConfig, not {config!r}.")
    if "custom_generate" not in kwargs:  # which may read fields of its own from it
        kwargs.pop("generation_config", None)
    named = {name: getattr(config, name, None) for name in _FIELDS}
    for name in (*_LENGTHS, *_ALWAYS):
        # A copy of the model's own config is as good as none.
        if named[name] in (getattr(defaults, name, None), _ALWAYS.get(name)):
            del named[name]
    return {**{name: value for name, value in named.items() if value is not None}, **kwargs}


def _overruled(defaults: GenerationConfig) -> dict[str, Any]:
    """Return what has to be said so that the model's own config does not say otherwise."""
    return {
        name: value
        for name, value in _ALWAYS.items()
        if getattr(defaults, name, None) not in (None, value)
    }


def _refuse(kwargs: dict[str, Any]) -> None:
    owned = [name for name in _OWNED if name in kwargs]
    if owned:
        raise ConfigError(
            f"{', '.join(owned)} cannot be passed: the generator sets up prompt and cache itself. "
            "Pass prefix, contexts and query."
        )
    for name, instead in _LENGTHS.items():
        if kwargs.get(name):
            raise ConfigError(
                f"{name} counts prompt tokens, which cached contexts make ambiguous. Use {instead}."
            )
    if kwargs.get("num_return_sequences", 1) != 1:
        raise ConfigError("num_return_sequences must be 1: a result holds one text.")
    if kwargs.get("assistant_model") is not None:
        raise ConfigError("assistant_model is not supported together with cached contexts.")
    if kwargs.get("adapter_names") is not None:
        raise ConfigError(
            "adapter_names would be heeded for the question alone, not for the contexts. "
            "Call model.set_adapter() before the question instead."
        )
    if kwargs.get("token_healing"):
        raise ConfigError(
            "token_healing replaces tokens of the prompt, whose states may be cached already. "
            "Leave it out, and end the query with a whole word."
        )


def check_temperature(temperature: Any) -> Any:
    """Return a temperature, or None.

    Raises
    ------
    ConfigError
        It is no finite number of at least 0.
    """
    if temperature is not None and not (
        is_number(temperature, Real) and 0 <= temperature < math.inf
    ):
        raise ConfigError(f"temperature must be a number of at least 0, not {temperature!r}.")
    return temperature


def with_sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments that say whether to sample, where they say anything about sampling.

    A temperature of 0 means greedy decoding, any other setting of sampling means sampling, and
    ``do_sample`` says it itself.
    """
    if "do_sample" in given:
        return dict(given)
    if given.get("temperature") == 0:
        return {**given, "do_sample": False}
    asks = any(given.get(name) is not None for name in SAMPLING)
    return {**given, "do_sample": True} if asks else dict(given)


def is_number(value: Any, kind: type) -> bool:
    """Tell whether a value is a number of a kind of :mod:`numbers`; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


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


def strings(name: str, given: Any) -> list[str]:
    """Return an argument that is a string, strings or None as a list, without empty ones.

    Raises
    ------
    ConfigError
        It is something else.
    """
    if given is None:
        return []
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Collection) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{name} must be a string or a list of strings, not {given!r}.")
    return [text for text in texts if text]


def _as_list(ids: int | list[int] | Tensor | None) -> list[int]:
    if ids is None:
        return []
    if isinstance(ids, Tensor):
        return [int(i) for i in ids.flatten()]
    return [ids] if isinstance(ids, int) else list(ids)
