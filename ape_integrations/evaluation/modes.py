"""Ways to encode the contexts of a prompt, by name, and what runs them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

import torch
from transformers import LogitsProcessor

from ape_integrations.core.config import APEConfig
from ape_integrations.core.generation import GenerationResult
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.core.state_source import Figures
from ape_integrations.errors import ConfigError, ContextWindowError
from ape_integrations.evaluation.prompts import Case

_PLAIN = {"attention_temperature": 1.0, "scaling_factor": 1.0}

#: Name, what it does, settings of APEConfig that it changes, and the one that ``name=value`` sets.
_MODES: tuple[tuple[str, str, Mapping[str, Any], str], ...] = (
    ("sequential", "one ordinary prompt", {}, ""),
    ("parallel", "every part alone from position 0, no shared prefix, T = S = 1", _PLAIN, ""),
    ("prefix", "every context alone behind the shared prefix, T = S = 1", _PLAIN, ""),
    ("ape", "behind the shared prefix, default T and S", {}, ""),
    ("tuned", "as ape, with the T and S that `tune` has saved for the model", {}, ""),
    (
        "recompute",
        "contexts in sequence, first layers and a share of the tokens computed again",
        {"recompute_ratio": 0.001},
        "recompute_ratio",
    ),
    ("ordered", "as ape, each context behind the last", {"context_positions": "sequential"}, ""),
    ("select", "as ape, of the contexts that matter most", {"max_contexts": 4}, "max_contexts"),
    ("count", "as ape, T and S by the number of contexts", {"adaptation": "count"}, ""),
)
MODES: Mapping[str, str] = {name: meaning for name, meaning, _, _ in _MODES}
#: A mode is never left for an ordinary prefill where that would be sooner done.
_MEASURED = {"prefill": "cached"}
_SHORT = {"T": "attention_temperature", "S": "scaling_factor"}


@dataclass(frozen=True)
class Mode:
    """One way to encode the contexts.

    Parameters
    ----------
    label : str
        As it was asked for.
    name : str
        One of :data:`MODES`.
    changes : dict
        Settings of :class:`APEConfig` that differ from the default.
    """

    label: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def meaning(self) -> str:
        """What it does, in words."""
        return MODES[self.name]

    def config(self, model: Any) -> APEConfig:
        """Return the settings of this mode for a model."""
        changes = {**_MEASURED, **self.changes}
        if self.name == "tuned":
            return APEConfig.from_tuned(model, **changes)
        return replace(APEConfig(), **changes)

    def as_json(self, model: Any) -> dict[str, Any]:
        """Describe the mode, with the settings in which it differs from the default config."""
        if self.name == "sequential":
            return {"meaning": self.meaning, "config": {}}
        config = self.config(model)
        names = [f.name for f in fields(APEConfig) if f.name not in _MEASURED]
        changed = {n: getattr(config, n) for n in names if getattr(config, n) != _default(n)}
        shown = {n: getattr(config, n) for n in _SHORT.values()}
        return {"meaning": self.meaning, "config": {**shown, **changed}}


def parse_mode(text: str) -> Mode:
    """Read a mode as it is written on the command line.

    Parameters
    ----------
    text : str
        A name of :data:`MODES`; with a value where it has one (``recompute=0.3``); with settings of
        :class:`APEConfig` behind a colon (``ape:T=0.8,S=1``).

    Raises
    ------
    ConfigError
        Unknown name or setting, or a value out of range.
    """
    head, _, settings = text.partition(":")
    name, _, value = head.partition("=")
    known = {mode[0]: mode for mode in _MODES}
    if name not in known:
        raise ConfigError(f"Unknown mode {name!r}. Choose from: {', '.join(known)}.")
    _, _, changes, main = known[name]
    changed = dict(changes)
    if value:
        if not main:
            raise ConfigError(f"Mode {name!r} takes no value; settings follow a colon: {name}:T=1.")
        changed[main] = _value(main, value)
    if settings and name == "sequential":
        raise ConfigError("Mode 'sequential' has no settings.")
    for setting in filter(None, settings.split(",")):
        key, _, given = setting.partition("=")
        changed[_SHORT.get(key, key)] = _value(_SHORT.get(key, key), given)
    replace(APEConfig(), **changed)  # refuses what is out of range
    return Mode(text, name, changed)


def _default(name: str) -> Any:
    return getattr(APEConfig(), name)


def _value(name: str, text: str) -> Any:
    """Turn the text of a setting into its type."""
    hints = get_type_hints(APEConfig)
    if name not in hints:
        raise ConfigError(f"Unknown setting {name!r}. Choose from: T, S, {', '.join(hints)}.")
    kinds = set(get_args(hints[name])) or {hints[name]}
    if type(None) in kinds and text == "none":
        return None
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    try:
        if int in kinds:
            return int(text)
        if float in kinds:
            return float(text)
    except ValueError:
        raise ConfigError(f"{name} must be a number, not {text!r}.") from None
    if bool in kinds:
        raise ConfigError(f"{name} must be true or false, not {text!r}.")
    return text


@dataclass(frozen=True)
class Answer:
    """What one mode gave for one case.

    Parameters
    ----------
    text : str or None
        The answer; None where the prompt does not fit the model in this mode.
    first_token : float
        Seconds to the first token, the contexts' states being in memory.
    total : float
        Seconds to the last token.
    tokens : int
        Prompt tokens.
    encode : float or None
        Seconds it took to encode the contexts, where they had to be.
    likelihood : float or None
        See :meth:`Runner.likelihood`; None where nobody asked for it.
    too_long : bool
        Whether there is no likelihood because the accepted answer does not fit the model behind the
        prompt.
    """

    text: str | None
    first_token: float = 0.0
    total: float = 0.0
    tokens: int = 0
    encode: float | None = None
    likelihood: float | None = None
    too_long: bool = False


class _GivenAnswer(LogitsProcessor):
    """Lets a model say given tokens, and notes how probable each was."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids
        self.log_probabilities: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        token = self._ids[len(self.log_probabilities)]
        self.log_probabilities.append(float(scores[0].float().log_softmax(dim=-1)[token]))
        given = torch.full_like(scores, -torch.inf)
        given[0, token] = 0.0
        return given


class Runner:
    """Answers cases in any mode, with one model and one store of states in memory.

    Modes that encode alike share states, so that a case is encoded once for all of them.

    Parameters
    ----------
    generator : APEGenerator
        With the default config. Its store should hold the states of one case at least: what does
        not fit is encoded while the clock runs.
    max_new_tokens : int
        Upper limit of an answer, in tokens.
    stop : sequence of str
        Strings to stop before.
    """

    def __init__(
        self, generator: APEGenerator, *, max_new_tokens: int = 48, stop: Sequence[str] = ()
    ) -> None:
        self.model, self.tokenizer = generator.model, generator.tokenizer
        self._arguments = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "stop": list(stop),
        }
        self._plain = generator
        self._generators = {generator.config: generator}
        self._configs: dict[str, APEConfig] = {}

    def answer(self, mode: Mode, case: Case) -> Answer:
        """Answer one case, greedily.

        States of the contexts are encoded before the clock starts, as they would have been at
        ingestion.
        """
        return self._timed(*self._asked(mode, case))

    def likelihood(self, mode: Mode, case: Case) -> float:
        """Return how probable the first accepted answer is to the model, behind the prompt.

        Returns
        -------
        float
            Geometric mean of the probabilities of the answer's tokens, each behind the ones before
            it.

        Raises
        ------
        ContextWindowError
            Prompt and answer do not fit the model.
        """
        generator, prompt = self._asked(mode, case)
        gap = "" if case.query[-1:].isspace() else " "
        ids = self.tokenizer(gap + case.answers[0], add_special_tokens=False)["input_ids"]
        if not ids:  # an empty answer is no answer that could be missed
            return 1.0
        answer = _GivenAnswer(ids)
        own = {"max_new_tokens": len(ids), "logits_processor": [answer], "repetition_penalty": 1.0}
        generator.generate_ids(prompt, **{**self._arguments, **own, "stop": []})
        generator.clear_assembled(keep_memory=True)
        return math.exp(sum(answer.log_probabilities) / len(ids))

    def _asked(self, mode: Mode, case: Case) -> tuple[APEGenerator, PreparedPrompt]:
        """Return what answers a case in a mode, and the prompt that it gets."""
        if mode.name == "sequential":
            separator = self._plain.config.context_separator
            text = case.sequential(separator, self.tokenizer.all_special_tokens)
            return self._plain, self._plain.prepare("", [], text)
        if mode.label not in self._configs:
            self._configs[mode.label] = mode.config(self.model)
        return self._generator(self._configs[mode.label]), self._prepare(mode, case)

    def _generator(self, config: APEConfig) -> APEGenerator:
        if config not in self._generators:
            unchecked = replace(config, self_check=False)  # the first one has checked the model
            self._generators[config] = APEGenerator(
                self.model, self.tokenizer, self._plain.store, unchecked
            )
        return self._generators[config]

    def _prepare(self, mode: Mode, case: Case) -> PreparedPrompt:
        prompt = self._plain.prepare(case.prefix, case.contexts, case.query)
        if mode.name != "parallel":
            return prompt
        # What stands before the contexts is then one more part that nothing else has read.
        first = [prompt.prefix] if prompt.prefix else []
        return PreparedPrompt([], [*first, *prompt.contexts], prompt.query)

    def _timed(self, generator: APEGenerator, prompt: PreparedPrompt) -> Answer:
        figures = Figures()
        try:
            if prompt.contexts:
                with self._plain.assemble(prompt, figures):
                    pass
                self._plain.clear_assembled(keep_memory=True)
            start = time.perf_counter()
            result: GenerationResult = generator.generate_ids(prompt, **self._arguments)
        except ContextWindowError:
            return Answer(None)
        total = time.perf_counter() - start
        generator.clear_assembled(keep_memory=True)
        return Answer(
            result.text,
            result.timings["first_token"],
            total,
            prompt.num_tokens,
            figures.encode if figures.misses else None,
        )
