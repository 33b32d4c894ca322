"""Arguments of a call, in LlamaIndex's words, as arguments of a generation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ape_integrations.core.generation import SAMPLING
from ape_integrations.core.settings import strings
from ape_integrations.errors import ConfigError

#: What other LLM classes call the same thing.
_SYNONYMS = {
    "max_tokens": "max_new_tokens",
    "stop_sequences": "stop",
    "stop_strings": "stop",
}


def generation_arguments(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge layers of arguments, later ones first in rank, into those of a generation.

    A temperature of 0 means greedy decoding. Any other sampling setting means sampling, unless
    the same or a later layer says ``do_sample=False``.

    Parameters
    ----------
    *layers : mapping
        Defaults of the LLM, then arguments of the call. None stands for "not given".

    Raises
    ------
    ConfigError
        A value is out of range.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        named = {_SYNONYMS.get(name, name): value for name, value in layer.items()}
        given = {name: value for name, value in named.items() if value is not None}
        if "do_sample" not in given:
            asks = [name for name in SAMPLING if name in given]
            if given.get("temperature") == 0:
                given["do_sample"] = False
            elif asks:
                given["do_sample"] = True
        merged.update(given)
    _check(merged)
    if merged.get("do_sample") is False or merged.get("temperature") == 0:
        merged["do_sample"] = False
        # Named and empty, or generate() warns about the model's own sampling settings.
        merged.update(temperature=None, top_p=None, top_k=None)
        merged.pop("min_p", None)
        merged.pop("typical_p", None)
    return merged


def _check(arguments: Mapping[str, Any]) -> None:
    temperature = arguments.get("temperature")
    if temperature is not None and (
        isinstance(temperature, bool)
        or not isinstance(temperature, (int, float))
        or not 0 <= temperature < math.inf
    ):
        raise ConfigError(f"temperature must be a number of at least 0, not {temperature!r}.")
    strings("stop", arguments.get("stop"))


@contextmanager
def clear_argument_errors() -> Iterator[None]:
    """Turn what transformers raises for arguments it cannot use into an error of the package.

    LlamaIndex's synthesizers answer "Empty Response" where an LLM raises a ``ValueError`` or a
    ``TypeError``.

    Raises
    ------
    ConfigError
        Instead of the two.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ConfigError(f"The request failed: {error}") from error
