"""What ChatAPE and APELanguageModel have in common: their fields and what becomes of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from langchain_core.messages.ai import UsageMetadata
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import GenerationConfig

from ape_integrations.core.config import APEConfig
from ape_integrations.core.generation import GenerationResult
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.settings import (
    check_temperature,
    is_number,
    strings,
    with_sampling,
)
from ape_integrations.errors import ConfigError
from ape_integrations.langchain.engine import (
    Engine,
    EnginePool,
    EngineSettings,
    LoadedModel,
    acquire,
)
from ape_integrations.models import DEMO_MODEL_NAME
from ape_integrations.store import DiskKVStore, check_store

#: Standard parameters of LangChain models that mean nothing for a model in the same process.
_MEANINGLESS = frozenset(
    {
        *("timeout", "max_retries", "api_key", "base_url"),
        *("stream_usage", "parallel_tool_calls", "user"),
    }
)

#: What ``model.generate()`` takes besides the fields of its generation config.
_GENERATE_ARGUMENTS = frozenset(
    {
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "streamer",
        "seed",
    }
)
_FROM_PRETRAINED_ARGUMENTS = frozenset(
    {
        "dtype",
        "torch_dtype",
        "device_map",
        "revision",
        "trust_remote_code",
        "quantization_config",
        "attn_implementation",
        "token",
        "local_files_only",
        "gguf_file",
    }
)

#: Arguments of ``from_pretrained`` that nobody else should read.
_SECRETS = frozenset({"token", "use_auth_token"})
_MASK = "**********"

#: Fields that a call may give as well.
_CALL_FIELDS = ("temperature", "max_tokens", "top_p", "stop", "seed")


class APESettings(BaseModel):
    """Fields of both LangChain models. Each sampling field can be given per call and bound, too."""

    model_config = ConfigDict(
        arbitrary_types_allowed=True, protected_namespaces=(), hide_input_in_errors=True
    )

    model: Any = None
    """Hub name or directory; a loaded model (with ``tokenizer``) and an APEGenerator are taken,
    too, and replaced by their names. None is the bundled demo model. Nothing is loaded before the
    first call."""
    tokenizer: Any = Field(default=None, exclude=True, repr=False)
    """The tokenizer of a loaded model."""
    loaded: LoadedModel | None = Field(default=None, exclude=True, repr=False)
    """The loaded model behind ``model``, where there is one."""
    configured: EnginePool = Field(default_factory=EnginePool, exclude=True, repr=False)
    """Engines of the copies that ``configurable_fields`` makes of this model."""
    temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature; 0 is greedy decoding, None what the model's generation config says."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens to generate at most; None leaves it to the model's generation config, then to 256."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Probability mass of nucleus sampling."""
    stop: list[str] | None = None
    """Strings before which the answer ends. ``stop`` of a call takes its place."""
    seed: int | None = None
    """Makes sampling reproducible, whatever other threads do."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments for ``model.generate()``, such as ``top_k`` or ``repetition_penalty``; none
    of those that are fields here."""
    load_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments for ``from_pretrained``, such as ``dtype`` or ``device_map``. A ``token`` stays
    out of traces and representations."""
    attention_temperature: float | None = None
    """T of APE; None is the default of APEConfig."""
    scaling_factor: float | None = None
    """S of APE; None is the default of APEConfig."""
    ape_config: APEConfig | None = Field(default=None, repr=False)
    """All settings of APE at once, instead of the two above."""
    store: Any = None
    """Where KV states are kept: a KVStore, or a directory. None is the user's cache directory."""
    cache_dir: str | None = None
    """Another name for a directory as ``store``."""
    capture: bool = True
    """Whether documents that any LangChain retriever in the process returns are registered."""

    @model_validator(mode="before")
    @classmethod
    def _sort_arguments(cls, values: Any) -> Any:
        """Tell loaded models from names, and refuse what would be ignored."""
        if not isinstance(values, Mapping):
            return values
        values = {k: v for k, v in values.items() if k not in _MEANINGLESS}
        tokenizer = values.pop("tokenizer", None)
        given = values.get("model")
        if isinstance(given, Path):
            values["model"] = str(given)
        elif isinstance(given, APEGenerator):
            values["loaded"] = LoadedModel(generator=given)
        elif given is not None and not isinstance(given, str):
            if tokenizer is None:
                raise ConfigError("A loaded model needs its tokenizer: pass tokenizer=...")
            values["loaded"] = LoadedModel(model=given, tokenizer=tokenizer)
            tokenizer = None
        if values.get("loaded") is not None:
            name = values["loaded"].name
            if not isinstance(values.get("model"), str):
                values["model"] = name
            elif values["model"] != name:
                del values["loaded"]  # a configured copy with another model
        if tokenizer is not None:
            raise ConfigError("tokenizer goes with a loaded model: pass both objects, or a name.")
        _refuse_unknown(values, cls)
        if isinstance(values.get("store"), Path):
            values["store"] = str(values["store"])
        if isinstance(values.get("cache_dir"), Path):
            values["cache_dir"] = str(values["cache_dir"])
        if isinstance(values.get("stop"), str):
            values["stop"] = [values["stop"]]
        return values

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        """Refuse second names for fields, and stores that are none."""
        _refuse_fields(self.model_kwargs)
        _length({"max_tokens": self.max_tokens, **self.model_kwargs})
        check_store(self.store)
        return self

    @model_validator(mode="after")
    def _find_engine(self) -> APESettings:
        if self.store is not None and self.cache_dir is not None:
            raise ConfigError("store and cache_dir are two names for one thing: pass one of them.")
        misplaced = sorted(_FROM_PRETRAINED_ARGUMENTS & set(self.model_kwargs))
        if misplaced:
            raise ConfigError(
                f"{', '.join(misplaced)} in model_kwargs: model_kwargs are for generation, "
                "load_kwargs for loading the model."
            )
        engine = self._engine  # held from now on, so that retrievals reach it
        if "configured" in self.model_fields_set:
            self.configured.keep(engine)
        return self

    @property
    def _engine(self) -> Engine:
        """The engine of the fields as they are now: copies and assignments may change them."""
        settings = self._engine_settings()
        held: dict[str | None, Engine] = self.__dict__.setdefault("_engines", {})
        if None not in held or held[None].settings != settings:
            self.__dict__["_engines"] = held = {None: acquire(settings)}
        return held[None]

    def _engine_settings(self) -> EngineSettings:
        generator = self.loaded.generator if self.loaded is not None else None
        if generator is not None:
            adapted = (self.attention_temperature, self.scaling_factor, self.ape_config)
            if any(value is not None for value in (*adapted, self.store, self.cache_dir)):
                raise ConfigError(
                    "An APEGenerator has its own store and APE settings: give them to it, not "
                    "to the LangChain model."
                )
        return EngineSettings(
            model=self.model,
            loaded=self.loaded,
            store=self.store if self.cache_dir is None else self.cache_dir,
            config=generator.config if generator is not None else self._ape_config(),
            load_kwargs=self.load_kwargs,
            capture=self.capture,
        )

    def _ape_config(self) -> APEConfig:
        adapted = {
            name: value
            for name in ("attention_temperature", "scaling_factor")
            if (value := getattr(self, name)) is not None
        }
        if self.ape_config is None:
            return APEConfig(**adapted)
        if adapted:
            raise ConfigError(f"ape_config and {', '.join(adapted)} say the same thing: pass one.")
        return self.ape_config

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; model and store are shared."""
        shared = {id(part): part for part in (self.store, self.loaded)}
        shared |= {id(engine): engine for engine in self.__dict__["_engines"].values()}
        return super().__deepcopy__({**(memo or {}), **shared})

    @property
    def generator(self) -> APEGenerator:
        """The generator that answers; the first use loads the model."""
        return self._engine.generator

    @property
    def name_of_model(self) -> str:
        """Name for responses and traces."""
        return self.model or DEMO_MODEL_NAME

    def _engine_for(self, model: str | None) -> tuple[Engine, str]:
        """Return the engine of a call, which may name another model, and that model's name."""
        if model is None or model == self.model:
            return self._engine, self.name_of_model
        own = self._engine.settings
        engines: dict[str | None, Engine] = self.__dict__["_engines"]
        if model not in engines:
            engines[model] = acquire(replace(own, model=str(model), loaded=None))
        return engines[model], str(model)

    def __repr_args__(self) -> Any:
        """Show every field but the secrets of loading."""
        masked = {k: _MASK if k in _SECRETS else v for k, v in self.load_kwargs.items()}
        for name, value in super().__repr_args__():
            yield name, masked if name == "load_kwargs" else value

    def _answer_params(self) -> dict[str, Any]:
        """Everything that changes an answer, for caches that key on it."""
        settings = self._engine.settings
        params: dict[str, Any] = {
            "model": self.name_of_model,
            "load_kwargs": {k: v for k, v in self.load_kwargs.items() if k not in _SECRETS},
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "top_p": self.top_p,
            "default_stop": self.stop,
            "seed": self.seed,
            "model_kwargs": self.model_kwargs,
            "ape": settings.config,
            "capture": self.capture,
        }
        if self.loaded is not None:
            params["fingerprint"] = self.loaded.fingerprint.digest()
            params["chat_template"] = self.loaded.parts[1].chat_template
        return params

    def _generation_kwargs(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Turn fields, and a call's arguments, which go first, into those of the generator.

        Raises
        ------
        ConfigError
            An argument that nothing would heed, or one that is out of range.
        """
        own = kwargs.pop("model_kwargs", None) or {}
        kwargs = {name: value for name, value in kwargs.items() if name not in _MEANINGLESS}
        if "max_completion_tokens" in kwargs:
            kwargs.setdefault("max_tokens", kwargs.pop("max_completion_tokens"))
        _refuse_fields({**self.model_kwargs, **own})
        given = {**own, **kwargs}
        call = {**self.model_kwargs, **given}
        for name in ("temperature", "top_p", "seed"):
            if call.get(name) is None:
                call[name] = getattr(self, name)
        call.pop("max_tokens", None)
        default = {"max_tokens": self.max_tokens, **self.model_kwargs}
        call["max_new_tokens"] = _length(given) or _length(default)
        call["stop"] = strings("stop", stop if stop is not None else self.stop) or None
        call.pop("stream", None)
        known = set(GenerationConfig().to_dict()) | _GENERATE_ARGUMENTS | {"stop"}
        _refuse_unknown(call, known)
        call = {name: value for name, value in call.items() if value is not None}
        _check_sampling(call)
        return with_sampling(call)


def _length(call: Mapping[str, Any]) -> int | None:
    """Return how many tokens a call allows, by whichever of the two names."""
    names = [name for name in ("max_tokens", "max_new_tokens") if call.get(name) is not None]
    if len(names) > 1:
        raise ConfigError("max_tokens and max_new_tokens are two names for one thing: pass one.")
    if not names:
        return None
    value = call[names[0]]
    if not is_number(value, Integral) or value < 1:
        raise ConfigError(f"{names[0]} must be at least 1, and a whole number, not {value!r}.")
    return int(value)


def _check_sampling(call: Mapping[str, Any]) -> None:
    """Refuse what the fields of the same names would not take."""
    check_temperature(call.get("temperature"))
    top_p, seed = call.get("top_p"), call.get("seed")
    if top_p is not None and not (is_number(top_p, Real) and 0 < top_p <= 1):
        raise ConfigError(f"top_p must be a number above 0 and at most 1, not {top_p!r}.")
    if seed is not None and not is_number(seed, Integral):
        raise ConfigError(f"seed must be a whole number, not {seed!r}.")


def _refuse_unknown(values: Mapping[str, Any], known: set[str] | type[BaseModel]) -> None:
    names = known if isinstance(known, set) else {*known.model_fields, *_aliases(known)}
    for name in values:
        if name not in names and not name.startswith("_"):  # what a copied model holds
            close = difflib.get_close_matches(name, sorted(names), n=1)
            if isinstance(known, set) and name in APESettings.model_fields:
                raise ConfigError(f"{name} is set when the model is made, not in a call.")
            hint = _place(name) or (f"Did you mean {close[0]}?" if close else "")
            raise ConfigError(f"Unknown argument {name!r}: it would change nothing. {hint}".strip())


def _place(name: str) -> str | None:
    """Say where an argument belongs that something else takes."""
    if name == "max_new_tokens":
        return "Pass it as max_tokens, or in model_kwargs."
    if name == "generator":
        return "Pass it as model."
    if name in _FROM_PRETRAINED_ARGUMENTS:
        return f"It is for loading: make the model with load_kwargs={{{name!r}: ...}}."
    if name in {field.name for field in fields(APEConfig)}:
        return f"It is a setting of APE: make the model with ape_config=APEConfig({name}=...)."
    if name in inspect.signature(DiskKVStore).parameters:
        return f"It belongs to DiskKVStore: make the model with store=DiskKVStore({name}=...)."
    if name in set(GenerationConfig().to_dict()) | _GENERATE_ARGUMENTS:
        return f"It is for model.generate(): pass it as model_kwargs={{{name!r}: ...}}."
    return None


def _refuse_fields(model_kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments for generation that have a field of their own."""
    for name in _CALL_FIELDS:
        if name in model_kwargs:
            raise ConfigError(
                f"{name} in model_kwargs: it is an argument of its own, so pass {name}=..., in "
                "the constructor or in a call."
            )


def _aliases(model: type[BaseModel]) -> set[str]:
    return {field.alias for field in model.model_fields.values() if field.alias}


def usage(result: GenerationResult) -> UsageMetadata:
    """Return token usage under LangChain's names."""
    return UsageMetadata(
        input_tokens=result.usage["prompt_tokens"],
        output_tokens=result.usage["completion_tokens"],
        total_tokens=result.usage["total_tokens"],
        input_token_details={"cache_read": result.usage["cached_tokens"]},
    )


def metadata(result: GenerationResult, model_name: str) -> dict[str, Any]:
    """Return a response's metadata; ``ape`` says what the cache did."""
    return {
        "model_name": model_name,
        "finish_reason": result.finish_reason,
        "ape": result.report(),
    }
