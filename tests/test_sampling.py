"""Both frameworks take a setting that only sampling has as the wish to sample."""

from __future__ import annotations

import pytest

from ape_integrations.core.generation import SAMPLING
from ape_integrations.langchain.settings import _sampling
from ape_integrations.llama_index.arguments import generation_arguments


@pytest.mark.parametrize("setting", sorted({*SAMPLING} - {"temperature"}))
def test_every_setting_of_sampling_switches_it_on(setting: str) -> None:
    assert generation_arguments({setting: 0.3})["do_sample"] is True
    assert _sampling({setting: 0.3})["do_sample"] is True
    assert generation_arguments({setting: 0.3, "temperature": 0.0})["do_sample"] is False
    assert _sampling({setting: 0.3, "temperature": 0})["do_sample"] is False
