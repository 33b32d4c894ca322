"""Tuned settings are found by the weights or the name they were tuned for, and for no others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from ape_integrations.core import tuned
from ape_integrations.core.config import APEConfig
from ape_integrations.core.fingerprint import model_fingerprint
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.tuned import TunedSettings, known_as, save_tuned
from ape_integrations.errors import ConfigError
from ape_integrations.models import DEMO_MODEL_NAME, demo_model_path
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuned, "tuned_directory", lambda: tmp_path / "tuned")
    return tmp_path / "tuned"


def settings(
    model: str = "some/model", fingerprint: str = "f", temperature: float = 0.7, saved: float = 1.0
) -> TunedSettings:
    return TunedSettings(model, fingerprint, temperature, 1.1, True, {}, saved)


def test_name_is_found_without_loading_anything() -> None:
    save_tuned(settings())
    config = APEConfig.from_tuned("some/model")
    assert (config.attention_temperature, config.scaling_factor) == (0.7, 1.1)


def test_loaded_model_and_generator_are_found_by_their_weights() -> None:
    model = tiny_model()
    save_tuned(settings("a name of long ago", model_fingerprint(model)))
    assert APEConfig.from_tuned(model).attention_temperature == 0.7
    generator = APEGenerator(model, byte_tokenizer(), MemoryKVStore("1MB"))
    assert APEConfig.from_tuned(generator).attention_temperature == 0.7


def test_changed_weights_are_another_model() -> None:
    model = tiny_model()
    save_tuned(settings("", model_fingerprint(model)))
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    with pytest.raises(ConfigError, match=r"no tuned settings.*fingerprint"):
        APEConfig.from_tuned(model)


def test_newest_result_of_a_name_counts() -> None:
    save_tuned(settings(fingerprint="a", temperature=0.6, saved=3.0))
    save_tuned(settings(fingerprint="b", temperature=0.8, saved=2.0))
    assert APEConfig.from_tuned("some/model").attention_temperature == 0.6


def test_directory_is_known_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert known_as("model") == known_as(tmp_path / "model") == str(tmp_path / "model")
    assert known_as(demo_model_path()) == DEMO_MODEL_NAME
    assert known_as("org/model") == "org/model"


def test_further_settings_are_taken() -> None:
    save_tuned(settings())
    config = APEConfig.from_tuned("some/model", max_new_tokens=5, scaling_factor=1.0)
    assert (config.max_new_tokens, config.scaling_factor) == (5, 1.0)


def test_named_file_is_read_and_must_fit_the_model(tmp_path: Path) -> None:
    path = save_tuned(settings(), tmp_path / "mine.json")
    assert APEConfig.from_tuned("some/model", path=path).attention_temperature == 0.7
    with pytest.raises(ConfigError, match=r"of other/model in .*mine.json"):
        APEConfig.from_tuned("other/model", path=path)
    with pytest.raises(ConfigError, match="Cannot read"):
        APEConfig.from_tuned("some/model", path=tmp_path / "nowhere.json")


def test_nothing_saved_names_the_command() -> None:
    with pytest.raises(ConfigError, match="ape-integrations tune"):
        APEConfig.from_tuned("some/model")
    with pytest.raises(ConfigError, match="must be a name"):
        APEConfig.from_tuned(3)


def test_damaged_file_hides_no_other(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tuned(settings())
    (directory / "bad.json").write_text('{"half')
    with caplog.at_level(logging.WARNING):
        assert APEConfig.from_tuned("some/model").attention_temperature == 0.7
    assert "bad.json" in caplog.text


def test_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        save_tuned(settings(), tmp_path / "file" / "tuned.json")
