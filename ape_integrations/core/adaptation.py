"""T and S for one set of contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ape_integrations.core.config import APEConfig

#: T falls by so much whenever the contexts double in number, down to so little.
_STEP, _LEAST = 0.04, 0.8


def adapted(config: APEConfig, lengths: Sequence[int]) -> tuple[float, float]:
    """Return T and S for contexts of these lengths.

    Parameters
    ----------
    config : APEConfig
        Settings.
    lengths : sequence of int
        Tokens of each context.

    Returns
    -------
    tuple of float
        1 and 1 where contexts are encoded as in a sequence: one context, or recomputed ones, whose
        attention is no longer flattened. Otherwise those of the config, or by their number.
    """
    if config.recompute_ratio > 0 or (len(lengths) == 1 and not config.adapt_single_context):
        return 1.0, 1.0
    if config.adaptation == "count":
        return by_count(lengths)
    return config.attention_temperature, config.scaling_factor


def by_count(lengths: Sequence[int]) -> tuple[float, float]:
    """Return T and S by the number of contexts; short ones count for less beside a long one.

    Attention over n contexts is spread over n times the keys, so T sharpens it by the logarithm of
    n. S stays 1: on the bundled model less costs answers at every number (docs/quality.md).
    """
    number = sum(lengths) / max(lengths)
    return max(_LEAST, 1 - _STEP * math.log2(number)), 1.0
