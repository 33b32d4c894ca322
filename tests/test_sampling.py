"""What a caller says of sampling decides, in both frameworks."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from ape_integrations.core.generation import SAMPLING
from ape_integrations.core.settings import GenerationSettings, with_sampling
from ape_integrations.llama_index.arguments import generation_arguments


@pytest.mark.parametrize("setting", sorted({*SAMPLING} - {"temperature"}))
def test_every_setting_of_sampling_switches_it_on(setting: str) -> None:
    for said in (with_sampling, generation_arguments):
        assert said({setting: 0.3})["do_sample"] is True
        assert said({setting: 0.3, "temperature": 0.0})["do_sample"] is False


@pytest.mark.parametrize("given", [{"temperature": 0}, {"do_sample": False, "top_p": 0.5}])
def test_greedy_decoding_leaves_no_setting_of_sampling(given: dict[str, Any]) -> None:
    """Nor one of the model's own generation config, of which transformers would warn."""
    own = GenerationConfig(do_sample=True, temperature=0.6, top_k=20)
    kwargs = GenerationSettings(with_sampling(given), own, 8).kwargs
    assert kwargs["do_sample"] is False
    assert all(kwargs[name] is None for name in SAMPLING)
