"""Faster matrix products: the same results, inside our own generations alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ape_integrations.core import attention, products
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.core.products import fast_products, in_pieces, prepare_linears
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Let all products pay, whatever the processor, and record what is multiplied."""
    seen: list[torch.Size] = []
    original = products.linear

    def recorded(rows: Any, weight: Any, bias: Any = None) -> Any:
        seen.append(rows.shape)
        return original(rows, weight, bias)

    monkeypatch.setattr(products, "onednn_pays", products.onednn_available)
    monkeypatch.setattr(products, "pieces_pay", lambda: True)
    monkeypatch.setattr(products, "linear", recorded)
    return seen


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("outputs", [1, 2, 12, 13, 96])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_pieces_make_the_whole(threads: None, outputs: int, batch: int, count: int) -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(batch, count, 16), torch.randn(batch, outputs + 3, 16)
    for some in (weights[:, :outputs].contiguous(), weights[:, :outputs]):
        product = in_pieces(rows, some)
        assert product.shape == (batch, count, outputs)
        torch.testing.assert_close(product, rows @ some.mT, atol=1e-5, rtol=1e-5)
    scattered = torch.randn(batch, 16, outputs).mT
    torch.testing.assert_close(in_pieces(rows, scattered), rows @ scattered.mT)


def test_products_equal_torchs_own(used: list[torch.Size]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 32, bias=False))
    fast = copy.deepcopy(plain)
    prepare_linears(fast)
    for shape in ((1, 1, 48), (3, 7, 48), (5, 48)):
        x = torch.randn(shape)
        with torch.no_grad(), fast_products():
            torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-5)
    assert len(used) == 6


def test_everybody_else_gets_torchs_own_bits(used: list[torch.Size]) -> None:
    layer = nn.Linear(48, 96)
    x = torch.randn(4, 48)
    before = layer(x)
    prepare_linears(layer)
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        assert torch.equal(layer(x), before)
    with fast_products():
        assert torch.equal(layer(x), before), "gradients are wanted"
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), fast_products():
        assert layer.double()(x.double()).dtype == torch.float64
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert not used


def test_another_thread_is_not_inside(used: list[torch.Size]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with fast_products(), ThreadPoolExecutor(1) as pool:
        assert products.active()
        assert not pool.submit(products.active).result()
    assert not products.active()


def test_prepared_model_stays_an_ordinary_model(used: list[torch.Size]) -> None:
    model = tiny_model()
    names, shown = list(model.state_dict()), repr(model)
    prepare_linears(model)
    assert list(model.state_dict()) == names and repr(model) == shown
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, expected)
        assert isinstance(twin.lm_head, nn.Linear)


def test_nothing_is_prepared_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_pays", lambda: False)
    monkeypatch.setattr(products, "pieces_pay", lambda: False)
    layer = nn.Linear(4, 4)
    prepare_linears(layer)
    assert type(layer) is nn.Linear


def test_subclasses_and_other_dtypes_are_left_alone(used: list[torch.Size]) -> None:
    class Special(nn.Linear):
        pass

    layers = nn.ModuleList([Special(4, 4), nn.Linear(4, 4, dtype=torch.float16)])
    prepare_linears(layers)
    assert [type(layer) for layer in layers] == [Special, nn.Linear]


def test_generation_uses_them_and_gives_the_same_tokens(used: list[torch.Size]) -> None:
    prompt = PreparedPrompt([5, 6], [list(range(10, 40)), list(range(50, 75))], [7, 8, 9])

    def tokens(model: nn.Module) -> list[int]:
        generator = APEGenerator(model, byte_tokenizer(), MemoryKVStore(), APEConfig())
        return generator.generate_ids(prompt, max_new_tokens=12, do_sample=False).token_ids

    model = tiny_model()
    fast = tokens(model)
    assert used
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear
    used.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "onednn_pays", lambda: False)
        patch.setattr(products, "pieces_pay", lambda: False)
        assert tokens(model) == fast
    assert not used


@pytest.mark.parametrize("shift", [0.0, -60.0, -90.0, -1e4])
def test_lse_whatever_the_first_keys_weigh(shift: float) -> None:
    logits = torch.randn(2, 5, 300) * 4
    logits[0, :3, : attention.LSE_KEYS] += shift
    found = attention._lse(logits, logits.softmax(dim=-1))
    expected = logits.double().logsumexp(dim=-1)
    assert float((found - expected).abs().max()) < 1e-5
