"""What users do to weights: dtypes, adapters, placement on devices, quantisation."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ape_integrations.core import fingerprint
from ape_integrations.core.config import APEConfig
from ape_integrations.core.fingerprint import ModelFingerprint
from ape_integrations.core.generator import APEGenerator
from ape_integrations.errors import UnsupportedModelError
from ape_integrations.store import MemoryKVStore
from tests.families.registry import SERVED, model_of
from tests.families.test_families import (
    CONTEXTS,
    PREFIX,
    QUERY,
    STEPS,
    S,
    T,
    attached,
    close,
    greedy,
    ids,
    own_greedy,
)
from tests.families.test_refusals import state
from tests.families.test_rope import model_with
from tests.models import byte_tokenizer
from tests.reference import reference_logits

LLAMA = "Llama 2, 3.x"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("title", [LLAMA, "Gemma 2", "GPT-OSS", "Qwen3-MoE"])
def test_states_keep_the_dtype_of_the_model(title: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model_of(title)).to(dtype)
    generator = attached(model)
    assert generator.info.dtype == dtype
    logits = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    expected = reference_logits(model, PREFIX, CONTEXTS, QUERY, T, S)
    bound = {torch.float16: 0.05, torch.bfloat16: 0.3, torch.float64: 1e-5}[dtype]
    assert float((logits.double() - expected).norm() / expected.norm()) < bound


def test_tied_embeddings_are_served() -> None:
    model = SERVED[LLAMA].build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits = attached(model).query_logits(PREFIX, CONTEXTS, QUERY)
    close(logits, reference_logits(model, PREFIX, CONTEXTS, QUERY, T, S))


needs_peft = pytest.mark.skipif(not installed("peft"), reason="peft is not installed")


def with_adapters(title: str = LLAMA) -> Any:
    """Return a model with two LoRA adapters, the first of them active."""
    import peft

    model = peft.get_peft_model(
        copy.deepcopy(model_of(title)),
        peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        adapter_name="first",
    )
    model.add_adapter(
        "second", peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    return model.eval()


@needs_peft
@pytest.mark.parametrize("title", [LLAMA, "Gemma 3 (text)", "Qwen2, 2.5"])
def test_active_adapter_is_served(title: str) -> None:
    model = with_adapters(title)
    generator = attached(model)
    expected, rows = own_greedy(model, [*PREFIX, *CONTEXTS[2], *QUERY])
    tokens, logits = greedy(generator, CONTEXTS[2:])
    assert tokens == expected
    close(logits, rows)
    without = attached(model_of(title)).query_logits(PREFIX, CONTEXTS, QUERY)
    assert float((generator.query_logits(PREFIX, CONTEXTS, QUERY) - without).abs().max()) > 0.1


@needs_peft
def test_each_state_of_adapters_has_its_own_entries() -> None:
    """Active, switched, both, off and merged: five fingerprints, and back again the first."""
    model = with_adapters()
    current = ModelFingerprint(model)
    seen = [ModelFingerprint(model_of(LLAMA)).digest(), current.digest()]
    model.set_adapter("second")
    seen.append(current.digest())
    model.base_model.set_adapter(["first", "second"])
    seen.append(current.digest())
    with model.disable_adapter():
        seen.append(current.digest())
    model.set_adapter("first")
    assert current.digest() == seen[1]
    model.merge_adapter()
    seen.append(current.digest())
    assert len(set(seen)) == len(seen)


@needs_peft
def test_switching_an_adapter_never_reads_the_states_of_another() -> None:
    model = with_adapters()
    generator = attached(model)
    first = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    model.set_adapter("second")
    second = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    fresh = attached(model).query_logits(PREFIX, CONTEXTS, QUERY)
    torch.testing.assert_close(second, fresh, atol=1e-4, rtol=0)
    assert float((second - first).abs().max()) > 0.1
    model.set_adapter("first")
    torch.testing.assert_close(
        generator.query_logits(PREFIX, CONTEXTS, QUERY), first, atol=1e-4, rtol=0
    )


@needs_peft
def test_adapter_swapped_in_place_never_reads_the_states_of_another() -> None:
    """PEFT's hotswapping writes through ``weight.data``, which torch does not count."""
    model = with_adapters()
    generator = attached(model)
    first = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    for name, weight in model.named_parameters():
        if ".first." in name:
            weight.data.copy_(torch.randn_like(weight))
    second = generator.query_logits(PREFIX, CONTEXTS, QUERY)
    fresh = attached(model).query_logits(PREFIX, CONTEXTS, QUERY)
    torch.testing.assert_close(second, fresh, atol=1e-4, rtol=0)
    assert float((second - first).abs().max()) > 0.1


def embedding_rows(model: Any) -> None:
    model.model.embed_tokens.weight[:3] = 0.5


def swapped_rows(model: Any) -> None:
    weight = model.model.embed_tokens.weight
    weight[:2] = weight[:2].flip(0)


def one_element(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight[3, 5] += 1e-3


def last_element(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight[-1, -1] *= 1.001


def all_columns_but_one(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight[:, 1:] *= 2


def replaced(model: Any) -> None:
    weight = model.model.norm.weight
    weight.data = weight.data * 1.1


CHANGES = [embedding_rows, swapped_rows, one_element, last_element, all_columns_but_one, replaced]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_weights_is_another_fingerprint(change: Any) -> None:
    """For the generator that saw the weights before, and for one that comes later."""
    model = SERVED[LLAMA].build(vocab_size=4096)
    known = ModelFingerprint(model)
    before = known.digest()
    copied = copy.deepcopy(model)
    assert ModelFingerprint(copied).digest() == before
    for changed in (model, copied):
        with torch.no_grad():
            change(changed)
    assert known.digest() != before
    assert ModelFingerprint(copied).digest() == known.digest()


@needs_peft
def test_merged_adapter_gives_what_the_active_one_gives() -> None:
    model = with_adapters()
    active = attached(model).query_logits(PREFIX, CONTEXTS, QUERY)
    merged = model.merge_and_unload()
    close(attached(merged).query_logits(PREFIX, CONTEXTS, QUERY), active.double(), 1e-3)


@needs_peft
def test_adapter_with_virtual_tokens_is_refused() -> None:
    """Prompt and prefix tuning put tokens in front that no position is kept for."""
    import peft

    base = copy.deepcopy(model_of(LLAMA))
    model = peft.get_peft_model(
        base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        APEGenerator(model, byte_tokenizer(), MemoryKVStore())
    assert state(model) == before


needs_accelerate = pytest.mark.skipif(
    not installed("accelerate"), reason="accelerate is not installed"
)


@needs_accelerate
@pytest.mark.parametrize(
    "placement",
    [
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "": "disk"},
        {"model.embed_tokens": "disk", "model.layers": "cpu", "": "disk"},
    ],
    ids=["layers on disk", "embeddings on disk"],
)
def test_offloaded_weights_give_the_same_logits(placement: dict[str, str], tmp_path: Path) -> None:
    """Weights come from disk module by module; states stay where they are computed."""
    import accelerate

    model = copy.deepcopy(model_of(LLAMA))
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    parts += [f"model.layers.{i}" for i in range(3)]

    def device(part: str) -> str:
        return next(
            (where for name, where in placement.items() if name and part.startswith(name)),
            placement[""],
        )

    expected = attached(copy.deepcopy(model)).query_logits(PREFIX, CONTEXTS, QUERY)
    spread = accelerate.dispatch_model(
        model,
        {part: device(part) for part in parts},
        main_device="cpu",
        offload_dir=str(tmp_path),
        force_hooks=True,
    )
    assert spread.lm_head.weight.device.type == "meta"
    generator = attached(spread)
    assert {where.type for where in generator.info.devices} == {"cpu"}
    assert generator.info.input_device.type == "cpu"
    close(generator.query_logits(PREFIX, CONTEXTS, QUERY), expected.double())
    assert ModelFingerprint(spread).digest() == ModelFingerprint(model_of(LLAMA)).digest()
    assert generator.generate("a", ["b", "c"], "d", max_new_tokens=3).token_ids


@needs_accelerate
def test_offloaded_weights_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Two models on disk with one config are two models."""
    import accelerate

    digests = []
    for seed in (0, 1):
        model = SERVED[LLAMA].build()
        torch.manual_seed(seed)
        for weight in model.parameters():
            torch.nn.init.normal_(weight)
        accelerate.disk_offload(model, str(tmp_path / str(seed)), execution_device="cpu")
        digests.append(ModelFingerprint(model).digest())
        assert ModelFingerprint(model).digest() == digests[-1]
    assert digests[0] != digests[1]


@needs_accelerate
def test_offloaded_weights_are_read_for_the_fingerprint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate

    model = SERVED[LLAMA].build()
    accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    generator, computed = attached(model), []
    real = fingerprint.model_fingerprint
    monkeypatch.setattr(fingerprint, "model_fingerprint", lambda m: computed.append(m) or real(m))
    for _ in range(3):
        generator.query_logits(PREFIX, CONTEXTS, QUERY)
    assert len(computed) == 1


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_fingerprint_does_not_depend_on_the_length_of_what_was_read(scaling: str) -> None:
    """Otherwise one long prompt would make every stored entry useless."""
    model = model_with(scaling)
    before = ModelFingerprint(model).digest()
    with torch.no_grad():
        model(input_ids=torch.tensor([ids(9, 94)]), use_cache=False)
    assert ModelFingerprint(model).digest() == before


@pytest.mark.skipif(not installed("torchao"), reason="torchao is not installed")
def test_int8_weights_of_torchao_are_served() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(model_of(LLAMA))
    plain = ModelFingerprint(model).digest()
    quantize_(model, Int8WeightOnlyConfig())
    _serves_like_itself(model)
    assert ModelFingerprint(model).digest() != plain


@pytest.mark.skipif(not installed("bitsandbytes"), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_of_bitsandbytes_are_served(bits: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shape = {"hidden_size": 128, "num_attention_heads": 8, "head_dim": 32}
    SERVED[LLAMA].build(**shape, intermediate_size=128).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    _serves_like_itself(model.eval())
    assert ModelFingerprint(model).digest() != ModelFingerprint(plain).digest()


def _serves_like_itself(model: Any) -> None:
    generator = attached(model)
    logits = generator.query_logits(PREFIX, CONTEXTS[2:], QUERY)
    with torch.no_grad():
        sequence = torch.tensor([[*PREFIX, *CONTEXTS[2], *QUERY]])
        expected = model(input_ids=sequence, use_cache=False).logits[0, -len(QUERY) :]
    assert float((logits - expected).norm() / expected.norm()) < 0.1
    assert len(greedy(generator, CONTEXTS)[0]) == STEPS


def test_attaching_needs_no_optional_package() -> None:
    """Adapters, quantisation and placement are looked at without importing their packages."""
    script = (
        "import sys\n"
        "for name in ('peft', 'accelerate', 'torchao', 'bitsandbytes'): sys.modules[name] = None\n"
        "from tests.families.registry import model_of\n"
        "from tests.families.test_families import attached\n"
        f"attached(model_of({LLAMA!r}))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_config_can_skip_the_numerical_check_but_not_the_rules() -> None:
    model = SERVED["Phi-3.5-MoE"].build(sliding_window=64)
    with pytest.raises(UnsupportedModelError, match="another rule"):
        attached(model, self_check=False)
    assert attached(SERVED["Phi-3.5-MoE"].build(sliding_window=512), self_check=False).config == (
        APEConfig(attention_temperature=T, scaling_factor=S, self_check=False)
    )
