"""Contexts in sequence: moved keys and recomputed tokens, against a float64 brute force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ape_integrations.core import recompute
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.errors import ConfigError, ContextWindowError
from ape_integrations.store import MemoryKVStore
from tests.families.registry import SERVED
from tests.models import VOCAB, byte_tokenizer, tiny_model
from tests.sequence_reference import sequence_reference

#: Positions are learned, and part of the states.
UNMOVABLE = ("GPT-2", "OPT", "GPT-BigCode, StarCoder")

#: Grouped heads, norms, windows, softcap, sinks, several rotary embeddings, parts of a head, pairs
#: of neighbours, layers without positions.
CHOSEN = (
    "Llama 2, 3.x",
    "Qwen3",
    "Mistral",
    "Ministral",
    "Ministral 3",
    "Gemma 2",
    "Gemma 3 (text)",
    "Phi 1, 2",
    "GLM-4 (2024)",
    "Command-R7B, Command A",
    "SmolLM3",
    "GPT-OSS",
)


def _ids(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB, (length,), generator=generator).tolist()


PREFIX, QUERY = _ids(1, 5), _ids(2, 7)
CONTEXTS = [_ids(3, 11), _ids(4, 4), _ids(5, 17), _ids(6, 17), _ids(7, 1)]


def _generator(model: Any, **config: Any) -> APEGenerator:
    return APEGenerator(model, byte_tokenizer(), MemoryKVStore(), APEConfig(**config))


def _sequential(model: Any, contexts: Sequence[Sequence[int]] = CONTEXTS) -> torch.Tensor:
    ids = [*PREFIX, *(token for context in contexts for token in context), *QUERY]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits
    return logits[0, -len(QUERY) :]


def _close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits.double(), expected.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("title", [title for title in SERVED if title not in UNMOVABLE])
def test_recomputing_everything_equals_sequential(title: str) -> None:
    """The goal of it all, for every family whose keys turn with their positions."""
    model = SERVED[title].build()
    logits = _generator(model, recompute_ratio=1.0).query_logits(PREFIX, CONTEXTS, QUERY)
    _close(logits, _sequential(model))


@pytest.mark.parametrize("title", CHOSEN)
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_contexts_in_sequence_equal_brute_force(title: str, ratio: float) -> None:
    """Moved keys alone, and with a share of the tokens recomputed."""
    model = SERVED[title].build()
    generator = _generator(
        model,
        context_positions="sequential",
        recompute_ratio=ratio,
        attention_temperature=0.8,
        scaling_factor=1.1,
    )
    assert generator._arranger is not None
    expected = sequence_reference(
        model,
        PREFIX,
        CONTEXTS,
        QUERY,
        *((1.0, 1.0) if ratio else (0.8, 1.1)),
        ratio,
        generator._arranger.measured_layer,
        recompute.STARTS,
    )
    _close(generator.query_logits(PREFIX, CONTEXTS, QUERY), expected.logits)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.2, 1.4, 1.6],
            "long_factor": [3.0, 4.0, 6.0, 9.0],
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_scaled_rotary_embeddings_equal_brute_force(rope: dict[str, Any], ratio: float) -> None:
    """Keys are moved by the angles of the model's own embedding."""
    model = tiny_model(rope_parameters={"rope_theta": 10000.0, **rope})
    generator = _generator(
        model,
        context_positions="sequential",
        recompute_ratio=ratio,
        attention_temperature=1.0,
        scaling_factor=1.0,
    )
    assert generator._arranger is not None
    layer = generator._arranger.measured_layer
    expected = sequence_reference(
        model, PREFIX, CONTEXTS, QUERY, 1.0, 1.0, ratio, layer, recompute.STARTS
    )
    _close(generator.query_logits(PREFIX, CONTEXTS, QUERY), expected.logits)


@pytest.mark.parametrize("layers", [1, 2])
def test_first_layers_are_all_there_is_of_a_shallow_model(layers: int) -> None:
    """States of two layers are exact once the first one is; so is the answer."""
    model = tiny_model(num_hidden_layers=layers)
    logits = _generator(model, recompute_ratio=0.01).query_logits(PREFIX, CONTEXTS, QUERY)
    _close(logits, _sequential(model))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("window", [None, 9])
def test_pieces_of_a_sequence_equal_the_whole(
    tokens: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that are read a few at a time see the new states of those before them."""
    model = tiny_model("mistral", sliding_window=window)
    whole = _generator(model, recompute_ratio=0.4).query_logits(PREFIX, CONTEXTS, QUERY)
    monkeypatch.setattr(recompute, "_BLOCK", 3)
    pieces = _generator(model, recompute_ratio=0.4, max_batch_tokens=tokens)
    _close(pieces.query_logits(PREFIX, CONTEXTS, QUERY), whole)
    exact = _generator(model, recompute_ratio=1.0, max_batch_tokens=tokens)
    _close(exact.query_logits(PREFIX, CONTEXTS, QUERY), _sequential(model))


def test_order_of_contexts_matters_in_sequence() -> None:
    """Another order is another set, and another answer."""
    model = tiny_model()
    generator = _generator(model, recompute_ratio=1.0)
    generator.query_logits(PREFIX, CONTEXTS, QUERY)
    backward = generator.query_logits(PREFIX, CONTEXTS[::-1], QUERY)
    _close(backward, _sequential(model, CONTEXTS[::-1]))
    assert not torch.allclose(backward, _sequential(model), atol=1e-2)


def test_equal_contexts_stand_twice_in_sequence() -> None:
    """Where contexts have places, a repeated one has two of them."""
    model, contexts = tiny_model(), [CONTEXTS[0], CONTEXTS[1], CONTEXTS[0]]
    generator = _generator(model, recompute_ratio=1.0)
    _close(generator.query_logits(PREFIX, contexts, QUERY), _sequential(model, contexts))


def test_one_context_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first context's states are those of a sequence already."""
    model = tiny_model()
    generator = _generator(model, recompute_ratio=1.0)
    monkeypatch.setattr(recompute.SequenceArranger, "_read", None)
    logits = generator.query_logits(PREFIX, CONTEXTS[:1], QUERY)
    _close(logits, _sequential(model, CONTEXTS[:1]))


def test_empty_prefix_in_sequence_equals_sequential() -> None:
    """Contexts may start the sequence."""
    model = tiny_model()
    logits = _generator(model, recompute_ratio=1.0).query_logits([], CONTEXTS, QUERY)
    ids = [*(token for context in CONTEXTS for token in context), *QUERY]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -len(QUERY) :]
    _close(logits, expected)


def test_stored_states_are_never_recomputed_in_place() -> None:
    """Entries stay as they were encoded, so that other prompts find the right ones."""
    model, store = tiny_model(), MemoryKVStore()
    shared = APEGenerator(model, byte_tokenizer(), store)
    before = shared.query_logits(PREFIX, CONTEXTS, QUERY)
    for config in (APEConfig(recompute_ratio=0.5), APEConfig(context_positions="sequential")):
        other = APEGenerator(model, byte_tokenizer(), store, config)
        other.query_logits(PREFIX, CONTEXTS, QUERY)
    shared.clear_assembled()
    assert torch.equal(shared.query_logits(PREFIX, CONTEXTS, QUERY), before)


def test_follow_up_question_recomputes_nothing() -> None:
    """A recomputed set is kept for the next question over the same contexts in the same order."""
    generator = _generator(tiny_model(), recompute_ratio=0.5)
    prompt = PreparedPrompt(PREFIX, CONTEXTS, QUERY)
    first = generator.generate_ids(prompt, max_new_tokens=2)
    again = generator.generate_ids(PreparedPrompt(PREFIX, CONTEXTS, QUERY[2:]), max_new_tokens=2)
    other = generator.generate_ids(PreparedPrompt(PREFIX, CONTEXTS[::-1], QUERY), max_new_tokens=2)
    assert first.timings["recompute"] > 0
    assert again.timings["recompute"] == 0
    assert other.timings["recompute"] > 0
    assert other.cache["misses"] == 0


def test_generation_in_sequence_equals_the_models_own() -> None:
    """Generated, streamed, batched, drafted, and behind an earlier turn: the model's own tokens."""
    model = tiny_model()
    generator = _generator(model, recompute_ratio=1.0)
    prompt = PreparedPrompt(PREFIX, CONTEXTS, QUERY)
    ids = torch.tensor([[*PREFIX, *(token for c in CONTEXTS for token in c), *QUERY]])
    own = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = own[0, ids.shape[1] :].tolist()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    result = generator.generate_ids(prompt, **options)
    assert result.token_ids == expected
    assert result.usage["prompt_tokens"] == ids.shape[1]
    turn = PreparedPrompt(PREFIX, CONTEXTS, [*QUERY, *expected[:6]])
    later = generator.generate_ids(turn, **{**options, "max_new_tokens": 6})
    assert later.token_ids == expected[6:]
    assert later.cache["tokens_reused"] > 0
    prompts = [PreparedPrompt(PREFIX, CONTEXTS, QUERY[3:]), prompt]
    assert generator.generate_batch_ids(prompts, **options)[1].token_ids == expected
    stream = generator._stream(prompt, options)
    list(stream)
    assert stream.result.token_ids == expected


@pytest.mark.parametrize("options", [{}, {"prefill": "plain"}])
def test_recomputing_everything_answers_the_joined_prompt(options: dict[str, Any]) -> None:
    """Of texts too: no separator comes between the last context and the query."""
    model = tiny_model()
    texts, query = ["The cat sleeps.", "A dog barks.", "Fish swim."], "Which one?"
    generator = _generator(model, recompute_ratio=1.0, **options)
    ids = generator.tokens.prompt("Answer.\n\n" + "\n\n".join(texts) + query)
    own = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    result = generator.generate(
        "Answer.\n\n", texts, query, max_new_tokens=8, do_sample=False, eos_token_id=-1
    )
    assert result.token_ids == own[0, len(ids) :].tolist()
    assert result.usage["prompt_tokens"] == len(ids)
    batch = generator.generate_batch(
        "Answer.\n\n", texts, [query, "Why?"], max_new_tokens=8, do_sample=False, eos_token_id=-1
    )
    assert batch[0].token_ids == result.token_ids


def test_sequence_that_does_not_fit_names_the_fix() -> None:
    """In sequence the contexts share the model's positions out among them."""
    generator = _generator(tiny_model(max_position_embeddings=60), recompute_ratio=0.2)
    with pytest.raises(ContextWindowError, match='context_positions="shared"'):
        generator.query_logits(PREFIX, CONTEXTS, QUERY)


@pytest.mark.parametrize("title", UNMOVABLE)
def test_keys_that_cannot_be_moved_are_refused(title: str) -> None:
    """Learned positions are part of the states; the error says what to use."""
    model = SERVED[title].build()
    with pytest.raises(ConfigError, match="recompute_ratio=0"):
        _generator(model, recompute_ratio=0.2)
    _generator(model)


def test_keys_changed_after_their_rotation_are_refused() -> None:
    """What is behind the rotation would be moved wrongly, and is noticed."""
    model = SERVED["HunYuan"].build()
    for name, weight in model.named_parameters():
        if "key_layernorm" in name:
            torch.nn.init.uniform_(weight, 0.2, 3.0)
    with pytest.raises(ConfigError, match="does not rotate them in a known way"):
        _generator(model, context_positions="sequential")


def test_wrong_recomputation_is_refused_when_the_model_is_attached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A family that sequence and cache disagree on gets an error, not wrong answers."""

    def forgets_windows(
        states: recompute.SequencedStates, query: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return query * 0.5

    monkeypatch.setattr(recompute.SequencedStates, "attend", forgets_windows)
    with pytest.raises(ConfigError, match="other logits behind recomputed contexts"):
        _generator(tiny_model(), recompute_ratio=0.5)
    _generator(tiny_model(), recompute_ratio=0.5, self_check=False)
