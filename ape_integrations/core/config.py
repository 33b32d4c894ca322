"""Settings of Adaptive Parallel Encoding."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ape_integrations.errors import ConfigError

Adaptation = Literal["fixed", "count"]
Prefill = Literal["auto", "cached", "plain"]
ContextPositions = Literal["shared", "sequential"]


@dataclass(frozen=True)
class APEConfig:
    """Settings of Adaptive Parallel Encoding (Yang, Chen, Chen, ICLR 2025, arXiv 2502.05431).

    Parameters
    ----------
    attention_temperature : float
        T in (0, 2]. Logits of query and generated tokens against context keys are divided by T;
        below 1 it sharpens the attention over contexts, which parallel encoding flattens.
    scaling_factor : float
        S in (0, 2]. The contexts' log-sum-exp is multiplied by ``S * T`` before the contexts'
        output is merged with that of prefix, query and generated tokens. T = S = 1 is plain
        parallel encoding.
    adapt_single_context : bool
        Parallel encoding of one context *is* sequential encoding, so T = S = 1 is used there
        unless this is true.
    recompute_ratio : float
        Share of the context tokens in [0, 1] whose states are computed again with attention to
        everything before them, contexts one after the other in the prompt's order, so that facts of
        several contexts can be joined. The first layers are read by all tokens again, to find the
        tokens that other contexts change most, so a ratio of 0.001 is an option as well. T = S = 1
        then. 1 equals sequential encoding. 0 turns it off.
    context_positions : {"shared", "sequential"}
        Whether all contexts start right behind the prefix (the paper), or each behind the one
        before it. Recomputing always takes sequential positions.
    max_contexts : int or None
        Read the contexts that matter most to the query, at most so many: those with the highest
        retrieval scores where all are known, so that the others are not even loaded; otherwise
        those that get the most attention, which costs one more pass over the query with all
        contexts loaded. None reads all.
    adaptation : {"fixed", "count"}
        Whether T and S are those above, or follow from the number of contexts and their lengths.
    default_prefix : str
        Shared prefix of prompts that start with a context (after the beginning-of-sequence
        token, where the tokenizer has one). The paper uses newlines.
    context_separator : str
        Text appended to every context before encoding, so that a context reads as it does in a
        prompt whatever its rank.
    reorder : bool
        Text before the contexts that varies from request to request (a question, a conversation)
        moves behind them, so that it does not enter their keys. Without it the order of the prompt
        is kept, and states are found again only where the question comes last.
    max_batch_tokens : int
        Tokens (padding included) that are encoded in one forward pass; bounds the memory of
        encoding.
    max_new_tokens : int
        Tokens to generate where a call does not say.
    draft_tokens : int
        Longest guess that is copied from the contexts and verified in one forward pass; the
        output is the same, sooner where answers quote. 0 turns it off.
    prefill : {"auto", "cached", "plain"}
        Whether contexts are read from stored states, or the prompt is prefilled as transformers
        alone would do it ("plain"), without store and without T and S. "auto" takes the states,
        unless loading them was seen to take more than twice as long as prefilling (a slow disk,
        very short contexts). Which way a prompt went stands in its figures as ``plan``. With
        "plain", ``max_contexts`` goes by retrieval scores alone.
    self_check : bool
        When a model is attached, compare a few tokens behind one context with the model's own
        sequential result, and refuse a model that differs.
    """

    attention_temperature: float = 0.9
    scaling_factor: float = 0.9
    adapt_single_context: bool = False
    recompute_ratio: float = 0.0
    context_positions: ContextPositions = "shared"
    max_contexts: int | None = None
    adaptation: Adaptation = "fixed"
    default_prefix: str = "\n\n"
    context_separator: str = "\n\n"
    reorder: bool = True
    max_batch_tokens: int = 2048
    max_new_tokens: int = 256
    draft_tokens: int = 8
    prefill: Prefill = "auto"
    self_check: bool = True

    @property
    def sequential(self) -> bool:
        """Whether each context starts behind the one before it."""
        return self.recompute_ratio > 0 or self.context_positions == "sequential"

    def __post_init__(self) -> None:
        for name in ("attention_temperature", "scaling_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{name} must be a number, not {value!r}.")
            if not math.isfinite(value) or not 0 < value <= 2:
                raise ConfigError(
                    f"{name} must lie in (0, 2], not {value!r}. "
                    "The paper uses 0.6 to 1.0; 0.9 is a good start."
                )
        ratio = self.recompute_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ConfigError(
                f"recompute_ratio must be a number from 0 (off) to 1 (sequential), not {ratio!r}."
            )
        for name, choices in (
            ("context_positions", ContextPositions),
            ("adaptation", Adaptation),
            ("prefill", Prefill),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, "
                    f"not {getattr(self, name)!r}."
                )
        for name in ("max_batch_tokens", "max_new_tokens", "max_contexts"):
            value = getattr(self, name)
            if value is None and name == "max_contexts":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if isinstance(self.draft_tokens, bool) or not isinstance(self.draft_tokens, int):
            raise ConfigError(f"draft_tokens must be a whole number, not {self.draft_tokens!r}.")
        if self.draft_tokens < 0:
            raise ConfigError("draft_tokens must be at least 0, which turns drafts off.")
        for name in ("default_prefix", "context_separator"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a string.")

    @classmethod
    def from_tuned(
        cls, model: Any, *, path: str | os.PathLike[str] | None = None, **changes: Any
    ) -> APEConfig:
        """Return the settings that ``ape-integrations tune`` has saved for a model.

        Parameters
        ----------
        model : str, Path, PreTrainedModel or APEGenerator
            A loaded model is found by its weights; a name or directory by itself, as it was given
            to ``tune``, without loading anything.
        path : path, optional
            File that ``tune --out`` wrote; by default the user's data directory is searched.
        **changes
            Further settings, or others than the tuned ones.

        Raises
        ------
        ConfigError
            Nothing was saved for this model. (Where tuning found nothing better than the defaults,
            that is saved, and they are returned.)
        """
        from ape_integrations.core.tuned import load_tuned

        tuned = load_tuned(model, path)
        settings: dict[str, Any] = {
            "attention_temperature": tuned.attention_temperature,
            "scaling_factor": tuned.scaling_factor,
        }
        return cls(**{**settings, **changes})
