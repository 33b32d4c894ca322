"""Checks of the accelerator path; run by ``test_devices.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from ape_integrations.core import attention, transfer
from ape_integrations.core.config import APEConfig
from ape_integrations.core.context_sets import ContextSetPool
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.errors import ConfigError
from ape_integrations.store import MemoryKVStore
from tests.core.test_transfer import Device
from tests.devices import simulation
from tests.devices.simulation import DeviceTensor
from tests.families.registry import SERVED, model_of
from tests.families.test_families import CONTEXTS, PREFIX, QUERY
from tests.models import byte_tokenizer, tiny_model

PROMPT = PreparedPrompt(PREFIX, CONTEXTS, QUERY)
OTHER = PreparedPrompt(PREFIX, CONTEXTS, [20, 21, 22])
PLAIN = PreparedPrompt([], [], [*PREFIX, *CONTEXTS[0], *QUERY])
LENGTH = {"max_new_tokens": 8, "eos_token_id": -1}

#: Windows, shared states, sinks: what differs most between families.
SOME = ["Llama 2, 3.x", "Gemma 3 (text)", "Gemma 4 (text)", "GPT-OSS"]


def some(*titles: str) -> list[Any]:
    """Return all families, those that are not named for the stress run."""
    return [t if t in titles else pytest.param(t, marks=pytest.mark.stress) for t in SERVED]


FAMILIES = some(*SOME)


def attached(model: Any, **config: Any) -> APEGenerator:
    settings = {"attention_temperature": 0.8, "scaling_factor": 1.2, **config}
    return APEGenerator(model, byte_tokenizer(), MemoryKVStore(), APEConfig(**settings))


def answers(generator: APEGenerator) -> dict[str, Any]:
    """Ask in every way there is; token ids by the way of asking."""

    def ask(prompt: PreparedPrompt, **settings: Any) -> list[int]:
        settings = {"do_sample": False, **LENGTH, **settings}
        return generator.generate_ids(prompt, **settings).token_ids

    first = ask(PROMPT)
    turn = PreparedPrompt(PREFIX, CONTEXTS, [*QUERY, *first, 30, 31])
    found = {"first": first, "same set": ask(PROMPT), "chat": ask(turn)}
    generator.clear_assembled(keep_memory=True)
    found["stored"] = ask(OTHER)
    batch = generator.generate_batch_ids([PROMPT, OTHER], do_sample=False, **LENGTH)
    found["batch"] = [result.token_ids for result in batch]
    found["beams"] = ask(PROMPT, num_beams=2)
    torch.manual_seed(3)
    found["sampled"] = ask(PROMPT, do_sample=True, temperature=0.7, top_p=0.9)
    found["plain"] = ask(PLAIN)
    return found


def check_family(title: str, move: Callable[[Any], Any], **config: Any) -> None:
    expected = answers(attached(model_of(title), **config))
    assert answers(attached(move(copy.deepcopy(model_of(title))), **config)) == expected


def spread(model: Any) -> Any:
    """Put the first layers on one device and the others on a second, as a device map does."""
    inner = model.model
    places = {f"model.{name}": 0 for name, _ in inner.named_children() if name != "layers"}
    places |= {"model.norm": 1, "lm_head": 0}  # the head is often tied to the embeddings
    half = (len(inner.layers) + 1) // 2
    places |= {f"model.layers.{i}": int(i >= half) for i in range(len(inner.layers))}
    devices = {name: torch.device(simulation.NAME, place) for name, place in places.items()}
    return dispatch_model(model, device_map=devices, main_device=simulation.FIRST)


def test_devices_are_kept_apart() -> None:
    """Otherwise nothing here could fail."""
    here, there = torch.ones(2, 2), torch.ones(2, 2).to(simulation.FIRST)
    assert isinstance(there, DeviceTensor) and (there @ there).device == simulation.FIRST
    for mixed in (lambda: there @ here, lambda: here + there, lambda: here[there.long()]):
        with pytest.raises(RuntimeError, match="with tensors on"):
            mixed()
    with pytest.raises(RuntimeError, match="sim:0 and sim:1"):
        there + here.to(simulation.SECOND)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


@pytest.mark.parametrize("title", FAMILIES)
def test_one_device(title: str) -> None:
    check_family(title, lambda model: model.to(simulation.FIRST))


@pytest.mark.parametrize("title", FAMILIES)
def test_two_devices(title: str) -> None:
    """Masks, shared states and contexts follow the layers."""
    if not hasattr(getattr(model_of(title), "model", None), "layers"):
        pytest.skip("its layers are found under other names")
    check_family(title, spread)


@pytest.mark.parametrize("title", some(SOME[0]))
def test_recomputing(title: str) -> None:
    try:
        attached(model_of(title), recompute_ratio=0.3)
    except ConfigError:
        pytest.skip("its keys cannot be moved")
    check_family(title, lambda model: model.to(simulation.FIRST), recompute_ratio=0.3)


class Late(Device):
    """Copies to the simulated device happen when somebody waits for them."""

    def open(self, device: torch.device) -> Any:
        return super().open(device) if device.type == simulation.NAME else None


@pytest.mark.parametrize("move", [lambda model: model.to(simulation.FIRST), spread])
@pytest.mark.parametrize("piece", [1, transfer.PIECE_BYTES])
def test_states_that_arrive_late(
    move: Callable[[Any], Any], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", piece)
    expected = answers(attached(tiny_model("llama")))
    generator, device = attached(move(tiny_model("llama"))), Late()
    generator._sets = ContextSetPool(generator.info, 1 << 30, device.open)
    assert answers(generator) == expected
    assert device.copies


def on_cuda(monkeypatch: pytest.MonkeyPatch, generation: int) -> list[str]:
    """Let attention take the simulated device for a CUDA device; the kernels that it uses."""
    used: list[str] = []

    def generation_of(device: torch.device) -> int | None:
        return generation if device.type == simulation.NAME else None

    def noting(name: str) -> None:
        kernel = getattr(attention, name)

        def run(*arguments: Any) -> Any:
            used.append(name)
            return kernel(*arguments)

        monkeypatch.setattr(attention, name, run)

    monkeypatch.setattr(attention, "_cuda_generation", generation_of)
    noting("_flash_cuda")
    noting("_efficient_cuda")
    return used


@pytest.mark.parametrize("title", FAMILIES)
def test_cuda_kernels_in_fp32(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(attached(model_of(title)))
    used = on_cuda(monkeypatch, generation=8)
    assert answers(attached(copy.deepcopy(model_of(title)).to(simulation.FIRST))) == expected
    # Softcap and values of another size are left to plain operations.
    assert set(used) <= {"_efficient_cuda"}
    assert used or title not in SOME


@pytest.mark.parametrize("generation, kernels", [(7, {"_efficient_cuda"}), (9, {"_flash_cuda"})])
@pytest.mark.parametrize("title", ["Llama 2, 3.x", "Gemma 3 (text)", "GPT-OSS"])
def test_cuda_kernels_in_bf16(
    title: str, generation: int, kernels: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to fp32 as the plain operations are."""

    def logits(model: Any, contexts: Sequence[list[int]]) -> torch.Tensor:
        return attached(model).query_logits(PREFIX, contexts, QUERY).cpu().float()

    half = copy.deepcopy(model_of(title)).bfloat16()
    exact = logits(model_of(title), CONTEXTS)
    error = float((logits(half, CONTEXTS) - exact).abs().max())
    used = on_cuda(monkeypatch, generation)
    found = logits(copy.deepcopy(half).to(simulation.FIRST), CONTEXTS)
    assert float((found - exact).abs().max()) <= 1.5 * error
    # Masks of sliding windows are more than flash attention can do.
    assert kernels <= set(used)


def test_text_with_a_stop_string() -> None:
    def text(model: Any) -> str:
        documents = ["Ada lives in Porto.", "Bo is a welder.", "Cy sings."]
        return attached(model).generate("<s>Read.\n\n", documents, "\nWho?", stop="e").text

    assert text(tiny_model("llama").to(simulation.FIRST)) == text(tiny_model("llama"))
