"""Arguments of a call, in LlamaIndex's words, as arguments of a generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ape_integrations.core.settings import check_temperature, strings, with_sampling
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
        merged.update(with_sampling(given))
    check_temperature(merged.get("temperature"))
    strings("stop", merged.get("stop"))
    return merged


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
