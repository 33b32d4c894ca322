"""States on their way to a device: in order, waited for layer by layer, never overwritten.

A fake device stands in for an accelerator: its copies happen when somebody waits for them and not
before, so that whoever reads too early reads garbage.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from ape_integrations.core import transfer
from ape_integrations.core.cache import APECacheLayer
from ape_integrations.core.config import APEConfig
from ape_integrations.core.context_sets import ContextSetPool
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model

DOCUMENTS = ["Ada lives in Porto.", "Bo is a welder, and has been for ten years.", "Cy sings."]
PREFIX, QUERY = "<s>Read this.\n\n", "\nWho sings?"
GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": -1}


class Device:
    """Runs copies in order, as late as possible, and notes what happened."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.copies = 0

    def open(self, device: torch.device) -> FakeLane:
        self.log.append("open")
        return FakeLane(self)


class FakeLane:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.layers = 0

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.device.copies += 1
        for source, target in pairs:
            target.fill_(torch.nan)
            self.pending.append((source, target))

    def mark(self) -> FakeArrival:
        self.layers += 1
        return FakeArrival(self, len(self.pending), self.layers - 1)

    def run(self, count: int) -> None:
        for index in range(count):
            if self.pending[index] is not None:
                source, target = self.pending[index]
                target.copy_(source)
                self.pending[index] = None  # type: ignore[call-overload]


class FakeArrival:
    def __init__(self, lane: FakeLane, copies: int, layer: int) -> None:
        self._lane, self._copies, self._layer = lane, copies, layer

    def wait(self) -> None:
        self._lane.device.log.append(f"wait {self._layer}")
        self._lane.run(self._copies)

    def settle(self) -> None:
        self._lane.device.log.append(f"settle {self._layer}")
        self._lane.run(self._copies)


def make_generator(
    device: Device | None = None, store: MemoryKVStore | None = None, **config: Any
) -> Any:
    generator = APEGenerator(
        tiny_model("llama"), byte_tokenizer(), store or MemoryKVStore(), APEConfig(**config)
    )
    if device is not None:
        generator._sets = ContextSetPool(generator.info, 1 << 30, device.open)
    return generator


def answer(generator: APEGenerator, documents: list[str] = DOCUMENTS) -> list[int]:
    return generator.generate(PREFIX, documents, QUERY, **GREEDY).token_ids


def test_each_layer_is_waited_for_once_in_order_before_it_is_read() -> None:
    device = Device()
    generator = make_generator(device)
    assert answer(generator) == answer(make_generator())
    assert device.log == ["open", "wait 0", "wait 1", "wait 2"]
    # A set that stands assembled is waited for again: another thread may have sent it.
    assert answer(generator) == answer(make_generator())
    assert device.log[4:] == ["wait 0", "wait 1", "wait 2"]


def test_layer_is_not_waited_for_before_the_one_in_front_of_it_has_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device()
    generator = make_generator(device)
    generator.generate(PREFIX, DOCUMENTS, QUERY, **GREEDY)  # prefix and store are warm now
    generator.clear_assembled()
    device.log.clear()
    update = APECacheLayer.update

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = update(self, *args, **kwargs)
        if self._contexts is not None:
            device.log.append("read")
        return states

    monkeypatch.setattr(APECacheLayer, "update", noting)
    generator.generate(PREFIX, DOCUMENTS, QUERY, **{**GREEDY, "max_new_tokens": 1})
    assert device.log == ["open", "wait 0", "read", "wait 1", "read", "wait 2", "read"]


def test_reading_without_waiting_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    generator = make_generator(device)
    monkeypatch.setattr(FakeArrival, "wait", lambda self: None)
    prompt = generator.prepare(PREFIX, DOCUMENTS, QUERY)
    assert generator.query_logits(prompt.prefix, prompt.contexts, prompt.query).isnan().any()


def test_states_that_are_changed_in_place_are_there_before() -> None:
    device = Device()
    generator = make_generator(device, recompute_ratio=0.3)
    assert answer(generator) == answer(make_generator(recompute_ratio=0.3))
    assert device.log[:4] == ["open", "wait 0", "wait 1", "wait 2"]


def test_spare_memory_is_not_written_while_it_is_still_read() -> None:
    device = Device()
    generator = make_generator(device)
    other = ["Di dances at night.", "Ed is a baker, and has been for two years.", "Flo runs."]
    with generator.assemble(generator.prepare(PREFIX, DOCUMENTS, QUERY)):
        pass  # sent, and read by nobody
    generator.clear_assembled(keep_memory=True)
    assert device.log == ["open", "settle 0", "settle 1", "settle 2"]
    assert answer(generator, other) == answer(make_generator(), other)
    assert not generator._sets._spare  # it was taken


def test_memory_of_an_idle_set_is_settled_before_another_set_takes_it() -> None:
    device = Device()
    generator = make_generator(device)
    prompt = generator.prepare(PREFIX, DOCUMENTS, QUERY)
    with generator.assemble(prompt):
        pass
    [kept] = generator._sets._sets.values()
    generator._sets._max_idle_bytes = kept.memory.nbytes  # no room for a second set
    other = ["Di dances, too.  !!", *DOCUMENTS[1:]]
    assert answer(generator, other) == answer(make_generator(), other)
    assert device.log[:5] == ["open", "settle 0", "settle 1", "settle 2", "open"]


class SlowStore(MemoryKVStore):
    """Delivers an entry only once so many copies have set out, or gives up."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.awaited: dict[str, int] = {}

    def load(self, key: str, spec: Any, destination: Any) -> int | None:
        deadline = time.monotonic() + 20
        while self.device.copies < self.awaited.get(key, 0):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return super().load(key, spec, destination)


def test_large_sets_set_out_while_later_contexts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    store = SlowStore(device)
    generator = make_generator(device, store)
    expected = answer(make_generator())
    assert answer(generator) == expected  # everything is stored now
    keys, contexts = generator._ordered(generator.prepare(PREFIX, DOCUMENTS, QUERY))
    two = len(contexts[0]) + len(contexts[1])
    monkeypatch.setattr(transfer, "PIECE_BYTES", generator.info.spec(two).nbytes)
    generator.clear_assembled(keep_memory=True)
    device.copies, device.log = 0, []
    store.awaited = {keys[2]: 3}  # one for each layer, of both contexts
    assert answer(generator) == expected
    assert device.copies == 6
    assert device.log == ["open", "wait 0", "wait 1", "wait 2"]


def test_nothing_sets_out_behind_a_context_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 1)
    device = Device()
    generator = make_generator(device)
    expected = answer(make_generator())
    keys, _ = generator._ordered(generator.prepare(PREFIX, DOCUMENTS, QUERY))
    for missing, pieces in ((keys[:1], 0), (keys[1:2], 1), (keys[2:], 2), (keys, 0)):
        assert answer(generator) == expected
        for key in missing:
            generator.store.delete(key)
        generator.clear_assembled(keep_memory=True)
        device.copies = 0
        assert answer(generator) == expected
        assert device.copies == 3 * (pieces + 1)


def test_layers_of_a_device_without_lanes_are_copied_at_once() -> None:
    staging = [(torch.ones(2, 3, 4), torch.zeros(2, 3, 4))] * 2
    devices = [torch.device("cpu"), torch.device("meta")]
    layers, arrivals = transfer.Transfer(staging, devices, transfer.cuda_lane).finish()
    assert layers[0][0] is staging[0][0]
    assert layers[1][0].device.type == "meta"
    assert arrivals == [None, None]


def test_cuda_devices_have_lanes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[torch.device] = []
    monkeypatch.setattr(transfer, "CudaLane", lambda device: opened.append(device) or "lane")
    assert transfer.cuda_lane(torch.device("cuda", 1)) == "lane"
    assert transfer.cuda_lane(torch.device("cpu")) is None
    assert opened == [torch.device("cuda", 1)]


def test_cuda_lane_orders_copies_behind_earlier_work_and_keeps_their_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is asked of CUDA, call by call: no such device is at hand where this runs."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Event) -> None:
            log.append(f"{self.name} waits for event")

    class Event:
        def record(self, stream: Stream) -> None:
            log.append(f"event on {stream.name}")

        def synchronize(self) -> None:
            log.append("host waits")

    class Inside:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            log.append(f"in {self.stream.name}")

        def __exit__(self, *error: object) -> None:
            log.append("out")

    class Target:
        def copy_(self, source: object, non_blocking: bool) -> None:
            log.append(f"copy, non_blocking={non_blocking}")

        def record_stream(self, stream: Stream) -> None:
            log.append(f"memory used on {stream.name}")

    device: Any = torch.device("cuda", 0)
    target: Any = Target()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute"))
    lane = transfer.CudaLane(device)
    lane.copy([(torch.ones(1), target)])
    lane.copy([(torch.ones(1), target)])
    arrival = lane.mark()
    arrival.wait()
    arrival.settle()
    assert log == [
        "side waits for compute",
        "in side",
        "copy, non_blocking=True",
        "memory used on side",
        "out",
        "in side",
        "copy, non_blocking=True",
        "memory used on side",
        "out",
        "event on side",
        "compute waits for event",
        "host waits",
    ]


@pytest.mark.parametrize("device", [None, Device()])
def test_a_set_of_no_contexts_is_assembled_as_well(device: Device | None) -> None:
    generator = make_generator(device)
    with generator.assemble(PreparedPrompt([5, 6], [], [7])) as cache:
        assert cache.get_seq_length() == 2
