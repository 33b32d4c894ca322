"""T and S for one set of contexts."""

from __future__ import annotations

from collections.abc import Sequence

from ape_integrations.core.config import APEConfig


def adapted(config: APEConfig, lengths: Sequence[int]) -> tuple[float, float]:
    """Return T and S for contexts of these lengths in tokens."""
    if len(lengths) == 1 and not config.adapt_single_context:
        return 1.0, 1.0
    if config.recompute_ratio == 1:
        return 1.0, 1.0
    return config.attention_temperature, config.scaling_factor
