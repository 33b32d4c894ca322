"""Arguments of a generation mean what they mean for transformers, or are refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from ape_integrations.core.asynchronous import stopped_by
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generation import SAMPLING, Cancellation, warpers
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.settings import GenerationSettings
from ape_integrations.errors import ConfigError
from ape_integrations.store import MemoryKVStore
from tests.core.test_generator import DOCUMENTS, PREFIX, QUERY, letters_only
from tests.models import byte_tokenizer, tiny_model

QUERIES = ["?", "\nWho sings?", "\nWhere does Ada live, and since when?"]


def make_generator(draft_tokens: int = 8, **own: Any) -> APEGenerator:
    """Return a generator over a model whose own generation config says ``own``."""
    model = tiny_model("llama")
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    config = APEConfig(max_new_tokens=12, draft_tokens=draft_tokens)
    return APEGenerator(model, byte_tokenizer(), MemoryKVStore(), config)


@pytest.fixture(scope="module")
def generator() -> APEGenerator:
    made = make_generator()
    tokens(made)  # the first products are timed with random numbers
    return made


def tokens(generator: APEGenerator, **kwargs: Any) -> list[int]:
    return generator.generate(PREFIX, DOCUMENTS, QUERY, **kwargs).token_ids


# Sampling with a seed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.3},
        {"min_p": 0.3},
        {"top_h": 0.2},
        {"typical_p": 0.2},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.4},
        {"temperature": 0.3},
        {"temperature": 2},
        {"watermarking_config": {"bias": 20.0, "seeding_scheme": "selfhash"}},
    ],
    ids=str,
)
def test_a_seed_changes_nothing_but_the_random_generator(
    generator: APEGenerator, setting: dict[str, Any]
) -> None:
    sampled = {"do_sample": True, "eos_token_id": -1, "temperature": 3.0, **setting}
    torch.manual_seed(7)
    expected = tokens(generator, **sampled)
    assert tokens(generator, seed=7, **sampled) == expected
    assert tokens(generator, seed=np.int64(7), **sampled) == expected
    without = {"do_sample": True, "eos_token_id": -1, "temperature": 3.0, "top_k": None}
    assert tokens(generator, seed=7, **without) != expected


def test_every_warper_of_transformers_is_known_in_its_order() -> None:
    values = (0.7, 0.9, 5, 0.9, 0.1, 0.9, 0.1, 0.1)
    settings = dict(zip(SAMPLING, values, strict=True))
    model = tiny_model("llama")
    config = GenerationConfig(do_sample=True, **settings)
    expected = [type(one) for one in model._get_logits_processor(config, 1, device="cpu")]
    assert [type(one) for one in warpers(settings)] == expected
    known = {name for name in dir(transformers) if name.endswith("LogitsWarper")}
    assert {kind.__name__ for kind in expected} == known
    assert not warpers(GenerationConfig._get_default_generation_params() | {"top_k": 0})


def test_a_seeded_and_a_greedy_call_are_no_batch() -> None:
    defaults = GenerationConfig()
    seeded = GenerationSettings({"do_sample": True, "seed": 1}, defaults, 5)
    other = GenerationSettings({"do_sample": True, "seed": 2, "temperature": 2.0}, defaults, 5)
    greedy = GenerationSettings({"temperature": 0}, defaults, 5)
    assert seeded.shared == other.shared is not None
    assert seeded.shared != greedy.shared is not None


@pytest.mark.parametrize("own", [{}, {"do_sample": True, "temperature": 0.7}])
@pytest.mark.parametrize("kwargs", [{}, {"seed": 3}, {"top_p": 0.5}])
def test_temperature_zero_is_greedy(own: dict[str, Any], kwargs: dict[str, Any]) -> None:
    generator = make_generator(**own)
    expected = tokens(generator, do_sample=False)
    assert tokens(generator, do_sample=True, temperature=0.0, **kwargs) == expected
    assert tokens(generator, temperature=0, **kwargs) == expected


# The caller's generation config, and the model's own ----------------------------------------------


def test_what_a_callers_config_leaves_open_is_as_the_models_own_says() -> None:
    whole = tokens(make_generator(), do_sample=False, eos_token_id=-1)
    generator = make_generator(eos_token_id=whole[3])
    config = GenerationConfig(do_sample=False, max_new_tokens=9)
    result = generator.generate(PREFIX, DOCUMENTS, QUERY, generation_config=config)
    assert result.token_ids == whole[: whole.index(whole[3]) + 1]
    assert result.finish_reason == "stop"
    batch = generator.generate_batch(PREFIX, DOCUMENTS, QUERIES, generation_config=config)
    for query, answer in zip(QUERIES, batch, strict=True):
        alone = generator.generate(PREFIX, DOCUMENTS, query, do_sample=False, max_new_tokens=9)
        assert answer.token_ids == alone.token_ids
        assert answer.finish_reason == alone.finish_reason
    # Arguments rank before the config, None included.
    assert len(tokens(generator, generation_config=config, eos_token_id=None)) == 9
    assert len(tokens(generator, generation_config=config, max_new_tokens=2)) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation cannot"),
        ({"use_cache": False}, "use_cache cannot"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate cannot"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences"),
        ({"max_length": 500}, "max_new_tokens"),
        ({"min_length": 50}, "min_new_tokens"),
        ({"token_healing": True}, "token_healing"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
    ],
)
def test_what_is_refused_is_refused_in_a_config_too(
    generator: APEGenerator, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tokens(generator, generation_config=GenerationConfig(**config))


@pytest.mark.parametrize("draft_tokens", [0, 8])
@pytest.mark.parametrize("contexts", [DOCUMENTS, []])
@pytest.mark.parametrize(
    "own",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"return_dict_in_generate": True},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"max_length": 20, "min_length": 0},
        {"token_healing": True},
    ],
    ids=str,
)
def test_the_models_own_config_breaks_nothing(
    own: dict[str, Any], contexts: list[str], draft_tokens: int
) -> None:
    expected = make_generator().generate(PREFIX, contexts, QUERY, do_sample=False).token_ids
    generator = make_generator(draft_tokens, **own)
    assert generator.generate(PREFIX, contexts, QUERY).token_ids == expected
    copied = copy.deepcopy(generator.model.generation_config)
    result = generator.generate(PREFIX, contexts, QUERY, generation_config=copied)
    assert result.token_ids == expected


# Padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 2},
        {"bad_words_ids": [[*byte_tokenizer()("s.?").input_ids[-2:], 43]]},
        {"stop_strings": ["..?"]},
    ],
    ids=str,
)
def test_padding_of_a_batch_is_seen_by_nothing(
    generator: APEGenerator, kwargs: dict[str, Any]
) -> None:
    kwargs = {"do_sample": False, **kwargs}
    batch = generator.generate_batch(PREFIX, DOCUMENTS, QUERIES, **kwargs)
    alone = [generator.generate(PREFIX, DOCUMENTS, query, **kwargs) for query in QUERIES]
    assert [one.token_ids for one in batch] == [one.token_ids for one in alone]
    assert [one.cache["batch"] for one in batch] == [1, 1, 1]
    assert generator._settings(kwargs).shared is None


def test_sequences_that_are_biased_do_not_begin_in_padding(generator: APEGenerator) -> None:
    seen = generator.prepare(PREFIX, DOCUMENTS, QUERIES[0]).logical_ids()[-6:]
    kwargs = {"do_sample": False, "sequence_bias": {(*seen, 43): 100.0, (*seen, 43, 44): 100.0}}
    batch = generator.generate_batch(PREFIX, DOCUMENTS, QUERIES, **kwargs)
    assert batch[0].token_ids[:2] == [43, 44]
    assert generator._settings(kwargs).shared is None


def test_min_length_of_the_model_counts_no_padding() -> None:
    ends = list(range(5, 384, 2))
    length = len(make_generator().prepare(PREFIX, DOCUMENTS, QUERIES[0]).logical_ids())
    generator = make_generator(min_length=length + 6, eos_token_id=ends)
    batch = generator.generate_batch(PREFIX, DOCUMENTS, QUERIES, do_sample=False)
    alone = [generator.generate(PREFIX, DOCUMENTS, q, do_sample=False) for q in QUERIES]
    assert [one.token_ids for one in batch] == [one.token_ids for one in alone]
    assert len(batch[0].token_ids) > 6
    assert generator._settings({}).shared is None


# Stop strings of transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [0, 8])
@pytest.mark.parametrize("contexts", [DOCUMENTS, []])
def test_stop_strings_end_the_text_behind_them(contexts: list[str], draft_tokens: int) -> None:
    generator = make_generator(draft_tokens)
    kwargs = {"do_sample": False, "logits_processor": [letters_only]}
    whole = generator.generate(PREFIX, contexts, QUERY, **kwargs).text
    end = whole[3:6]
    expected = whole[: whole.index(end) + 3]
    for extra in ({"stop_strings": [end]}, {"stop_strings": end, "tokenizer": byte_tokenizer()}):
        result = generator.generate(PREFIX, contexts, QUERY, **extra, **kwargs)
        assert (result.text, result.finish_reason) == (expected, "stop")
    generator.model.generation_config.stop_strings = [end]
    assert generator.generate(PREFIX, contexts, QUERY, **kwargs).text == expected
    if contexts:
        [one] = generator.generate_batch(PREFIX, contexts, [QUERY], **kwargs)
        assert one.text == expected


def test_stop_and_stop_strings_end_beams_alike(generator: APEGenerator) -> None:
    kwargs = {"num_beams": 2, "do_sample": False, "logits_processor": [letters_only]}
    whole = generator.generate(PREFIX, DOCUMENTS, QUERY, **kwargs).text
    end = whole[3:5]
    both = generator.generate(PREFIX, DOCUMENTS, QUERY, stop=["0"], stop_strings=[end], **kwargs)
    assert (
        both.text == generator.generate(PREFIX, DOCUMENTS, QUERY, stop_strings=[end], **kwargs).text
    )
    assert both.text.endswith(end)


# Single values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seed": "x"}, "seed must"),
        ({"seed": 2**70}, "64 bits"),
        ({"seed": True}, "seed must"),
        ({"seed": 1, "num_beams": 2, "do_sample": True}, "num_beams=1"),
        ({"num_beams": "2"}, "num_beams must"),
        ({"stop": 3}, "stop must"),
        ({"stop": [None]}, "stop must"),
        ({"stop_strings": [3]}, "stop_strings must"),
        ({"temperature": -0.1}, "temperature must"),
        ({"temperature": "hot"}, "temperature must"),
        ({"temperature": float("nan")}, "temperature must"),
        ({"top_p": -1.0, "do_sample": True}, "top_p"),
        ({"top_k": "many", "do_sample": True, "seed": 1}, "top_k"),
        ({"min_length": 50}, "min_new_tokens"),
        ({"token_healing": True}, "token_healing"),
        ({"generation_config": {"max_new_tokens": 3}}, "GenerationConfig"),
        ({"logits_processor": 3}, "logits_processor must"),
        ({"stopping_criteria": ["end"]}, "stopping_criteria must"),
    ],
    ids=str,
)
def test_bad_values_are_refused(
    generator: APEGenerator, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tokens(generator, **kwargs)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "generation_config"])
def test_none_is_not_given(generator: APEGenerator, name: str) -> None:
    expected = tokens(generator, do_sample=False)
    assert tokens(generator, do_sample=False, **{name: None}) == expected


def test_one_processor_or_criterion_needs_no_list(generator: APEGenerator) -> None:
    class Letters(LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return letters_only(ids, scores)

    class AtOnce(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            return torch.ones(ids.shape[0], dtype=torch.bool)

    expected = tokens(generator, do_sample=False, logits_processor=[Letters()])
    assert tokens(generator, do_sample=False, logits_processor=Letters()) == expected
    kwargs = {"do_sample": False, "logits_processor": Letters(), "stopping_criteria": AtOnce()}
    assert tokens(generator, **kwargs) == expected[:1]
    assert tokens(generator, **stopped_by(kwargs, Cancellation())) == expected[:1]
