"""What users do to a model or tokenizer between questions never makes an answer wrong."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ape_integrations.core.config import APEConfig
from ape_integrations.core.fingerprint import ModelFingerprint
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.errors import ConfigError
from ape_integrations.store import DiskKVStore, MemoryKVStore
from tests.core.test_torch_modes import CONTEXTS, PREFIX, QUERY, SETTINGS
from tests.families.registry import model_of
from tests.models import byte_tokenizer, tiny_model


def made(model: Any, **config: Any) -> APEGenerator:
    return APEGenerator(model, byte_tokenizer(), MemoryKVStore(), APEConfig(**config))


def ask(generator: APEGenerator, contexts: list[list[int]] = CONTEXTS, **settings: Any) -> Any:
    prompt = PreparedPrompt(PREFIX, contexts, QUERY)
    return generator.generate_ids(prompt, **{**SETTINGS, **settings})


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda weights: torch.optim.AdamW(weights, lr=0.05, fused=True),
        lambda weights: torch.optim.SGD(weights, lr=0.05, fused=True),
        lambda weights: torch.optim.AdamW(weights, lr=0.05, foreach=True),
    ],
    ids=["fused AdamW", "fused SGD", "foreach AdamW"],
)
def test_training_step_makes_states_anew(optimizer: Any) -> None:
    """Fused optimizers, the default of ``Trainer``, do not raise a tensor's version."""
    model = tiny_model()
    generator = made(model)
    before = ask(generator).token_ids
    step = optimizer(model.parameters())
    tokens = torch.tensor([[*PREFIX, *CONTEXTS[0], *QUERY]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    step.step()
    result = ask(generator)
    assert result.cache["hits"] == 0 and result.cache["tokens_reused"] == 0
    assert result.token_ids == ask(made(copy.deepcopy(model))).token_ids != before


def test_new_tensor_in_an_old_ones_place_is_noticed() -> None:
    """The allocator gives ids and addresses again; a tensor that is gone is not the same."""
    model = tiny_model()
    fingerprint = ModelFingerprint(model)
    layer = model.model.layers[1].mlp
    seen = {fingerprint.digest()}
    for seed in range(30):
        shape = layer.up_proj.weight.shape
        layer.up_proj = None
        torch.manual_seed(seed)
        layer.up_proj = torch.nn.Linear(shape[1], shape[0], bias=False)
        seen.add(fingerprint.digest())
    assert len(seen) == 31


# Modes --------------------------------------------------------------------------------------------


def _with_dropout() -> Any:
    model = tiny_model(attention_dropout=0.5)
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    return model


def test_training_mode_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    """Dropout in stored states would stay in every later answer."""
    model = _with_dropout()
    expected = ask(made(copy.deepcopy(model))).token_ids
    store = DiskKVStore(tmp_path)
    generator = APEGenerator(model, byte_tokenizer(), store)
    model.train()
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        ask(generator)
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        generator.warm("a prefix", ["a text"], show_progress=False)
    generator.prefetch(["a text"], "a prefix")
    generator.close()
    assert store.stats().entries == 0
    model.eval()
    assert ask(APEGenerator(model, byte_tokenizer(), store)).token_ids == expected


def test_dropout_of_an_adapter_is_refused_while_it_trains() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    generator = made(model)
    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    assert not model.training
    with pytest.raises(ConfigError, match="training mode"):
        ask(generator)
    adapted.eval()
    assert ask(generator).token_ids


@pytest.mark.parametrize("chosen", ["eager", "sdpa", "flex_attention"])
def test_attention_that_is_chosen_later_stays_behind_ape(chosen: str) -> None:
    model = tiny_model()
    generator = made(model)
    expected = ask(generator).token_ids
    model.set_attn_implementation(chosen)
    generator.clear_assembled()
    assert ask(generator).token_ids == expected
    assert model.config._attn_implementation == f"ape_{chosen}"


def test_another_config_does_not_continue_the_turns_of_the_first() -> None:
    model = tiny_model()
    generator = made(model)
    ask(generator)
    changed = APEConfig(attention_temperature=0.5, scaling_factor=0.6)
    generator.config = changed
    result = ask(generator)
    expected = ask(made(model, attention_temperature=0.5, scaling_factor=0.6))
    assert result.token_ids == expected.token_ids
    assert result.cache["tokens_reused"] == 0


# Positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["GPT-2", "Llama 2, 3.x"])
def test_drafts_end_with_the_last_position(family: str) -> None:
    """The answer repeats a context up to the model's last position, where drafts would go on."""
    model = model_of(family)
    limit = made(copy.deepcopy(model)).info.max_positions
    context = [20 + place % 7 for place in range(limit - len(PREFIX) - len(QUERY) - 9)]

    def repeat(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(scores, -1e9)
        scores[:, 20 + (int(tokens[0, -1]) - 19) % 7] = 0
        return scores

    answers = [
        ask(
            made(copy.deepcopy(model), draft_tokens=drafts),
            [context],
            max_new_tokens=9,
            logits_processor=[repeat],
        ).token_ids
        for drafts in (0, 8)
    ]
    assert len(answers[0]) == 9 and answers[0] == answers[1]


def test_text_beyond_the_models_positions_is_left_out_of_warming() -> None:
    """A prompt would split it elsewhere; with learned positions it could not even be read."""
    generator = made(copy.deepcopy(model_of("GPT-2")))
    limit = generator.info.max_positions
    assert limit is not None
    texts = ["a short text", "x" * (2 * limit), "another one"]
    with pytest.warns(UserWarning, match="1 of 3 texts are longer"):
        counts = generator.warm("a prefix", texts, show_progress=False)
    assert counts == {"contexts": 2, "hits": 0, "misses": 2}
    generator.prefetch(texts[1:], "a prefix")
    generator.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = generator.generate("a prefix", [texts[0], texts[2]], "?", max_new_tokens=2)
    assert result.cache["hits"] == 2


# Texts --------------------------------------------------------------------------------------------


def test_half_a_character_is_read_as_a_replacement_character() -> None:
    """Readers of PDF files give such strings, and tokenizers refuse them."""
    generator = made(tiny_model())
    broken, mended = "a \ud83d text", "a \ufffd text"
    expected = generator.generate("p", [mended], "q", max_new_tokens=4).token_ids
    assert generator.generate("p", [broken], "q", max_new_tokens=4).token_ids == expected
    assert generator.warm("p", [broken], show_progress=False)["hits"] == 1


def test_tokens_that_were_added_later_are_known_everywhere() -> None:
    tokenizer = byte_tokenizer()
    generator = APEGenerator(tiny_model(), tokenizer, MemoryKVStore())
    generator.warm("p", ["an <added> one"], show_progress=False)
    tokenizer.add_tokens(["<added>"])
    (added,) = tokenizer.convert_tokens_to_ids(["<added>"])
    prompt = generator.prepare("p", ["an <added> one"], "the <added> one")
    assert added in prompt.contexts[0] and added in prompt.query


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [0, 8])
@pytest.mark.parametrize("contexts", [1, 3])
@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}], ids=str
)
@pytest.mark.parametrize("where", ["call", "model"])
def test_other_ways_to_draft_change_no_token(
    settings: dict[str, Any], contexts: int, draft_tokens: int, where: str
) -> None:
    """They read the whole prompt again behind the cache."""
    model = tiny_model()
    expected = ask(made(model, draft_tokens=draft_tokens), CONTEXTS[-contexts:]).token_ids
    if where == "model":
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        settings = {}
    generator = made(model, draft_tokens=draft_tokens)
    assert ask(generator, CONTEXTS[-contexts:], **settings).token_ids == expected


def test_adapters_by_request_are_refused() -> None:
    with pytest.raises(ConfigError, match="set_adapter"):
        ask(made(tiny_model()), adapter_names=["a"])


def test_constraints_are_not_dropped_for_drafts() -> None:
    """Transformers has its say: it wants beams, or code of its own."""
    with pytest.raises(ValueError, match=r"[Cc]onstrain"):
        ask(made(tiny_model()), force_words_ids=[[60]])


def test_stop_iteration_of_a_processor_is_no_end_of_a_stream() -> None:
    def stop(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise StopIteration

    stream = made(tiny_model()).stream("p", ["text"], "q", logits_processor=[stop])
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(stream)
