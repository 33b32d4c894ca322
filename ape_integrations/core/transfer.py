"""States on their way to an accelerator, beside whatever is read and computed meanwhile.

Copies of one context set go to a stream of their own, out of pinned memory. Large sets set out
while their later contexts are still being read; what is left when all are there goes layer by
layer. An event stands behind each layer; the cache waits for it before the layer is first read, so
that the first layers compute while the later ones still arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]

#: Bytes that are worth sending before the rest is there. Tokens of one head lie together, so that
#: much less would make copies that take longer to start than to run.
PIECE_BYTES = 1 << 29


class Arrival(Protocol):
    """The moment at which a layer's states have arrived."""

    def wait(self) -> None:
        """Let whatever this thread gives the device from now on come after it; returns at once."""

    def settle(self) -> None:
        """Block this thread until it has come."""


class Lane(Protocol):
    """Copies to one device that run one after the other, beside its other work."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy sources in pinned CPU memory to targets on the device; returns at once."""

    def mark(self) -> Arrival:
        """Return the arrival of everything copied so far."""


class CudaLane:
    """A side stream of a CUDA device.

    Parameters
    ----------
    device : torch.device
        Where copies go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._used = False

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy sources in pinned CPU memory to targets on the device; returns at once."""
        if not self._used:
            # Targets may lie in memory that earlier work on the current stream still reads.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._used = True
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                # Or the memory could be given away while the copy still writes to it.
                target.record_stream(self._stream)

    def mark(self) -> CudaArrival:
        """Return the arrival of everything copied so far."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return CudaArrival(event, self._device)


class CudaArrival:
    """An event on a side stream."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        """Let whatever this thread gives the device from now on come after it; returns at once."""
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def settle(self) -> None:
        """Block this thread until it has come."""
        self._event.synchronize()


OpenLane = Callable[[torch.device], Lane | None]


def cuda_lane(device: torch.device) -> Lane | None:
    """Open a lane to a CUDA device; other devices have none."""
    return CudaLane(device) if device.type == "cuda" else None


class Transfer:
    """The way of one context set to its devices.

    Parameters
    ----------
    staging : list of (Tensor, Tensor)
        Per layer, keys and values ``(kv_heads, total, head_dim)`` in CPU memory, pinned for lanes.
        What has set out is not to be written again before the arrivals.
    devices : sequence of torch.device
        One per layer.
    open_lane : callable
        Opens a lane to a device. Without one, a layer is copied at the end, at once; on the CPU it
        stays what it is.
    """

    def __init__(
        self, staging: Layers, devices: Sequence[torch.device], open_lane: OpenLane
    ) -> None:
        self._staging = staging
        self._devices = devices
        self._open_lane = open_lane
        self._nbytes = sum(tensor.nbytes for layer in staging for tensor in layer)
        self._total = staging[0][0].shape[1]
        self._sent = 0
        self._lanes: list[Lane | None] = []
        self._targets: Layers = []

    def advance(self, ready: int) -> None:
        """Let what is there set out, unless it is too little to be worth it.

        Parameters
        ----------
        ready : int
            Tokens from the start whose states stand in ``staging``, in all layers.
        """
        enough = (ready - self._sent) * self._nbytes >= PIECE_BYTES * self._total
        if not enough or ready == self._total:
            return
        self._prepare()
        for layer, lane in enumerate(self._lanes):
            if lane is not None:
                self._copy(layer, lane, ready)
        self._sent = ready

    def finish(self) -> tuple[Layers, list[Arrival | None]]:
        """Let the rest set out, first layer first.

        Returns
        -------
        tuple of list of (Tensor, Tensor) and list of Arrival or None
            The layers on their devices, and what to wait for before each is read; None: nothing.
        """
        self._prepare()
        arrivals: list[Arrival | None] = []
        for layer, lane in enumerate(self._lanes):
            if lane is None:
                keys, values = self._staging[layer]
                device = self._devices[layer]
                self._targets[layer] = keys.to(device), values.to(device)
                arrivals.append(None)
            else:
                self._copy(layer, lane, self._total)
                arrivals.append(lane.mark())
        return self._targets, arrivals

    def _prepare(self) -> None:
        """Open lanes, and make room for all that they bring before the first of them is used."""
        if self._lanes:
            return
        opened = {device: self._open_lane(device) for device in dict.fromkeys(self._devices)}
        self._lanes = [opened[device] for device in self._devices]
        for sources, device, lane in zip(self._staging, self._devices, self._lanes, strict=True):
            target = sources
            if lane is not None:
                keys, values = sources
                target = (
                    torch.empty_like(keys, device=device),
                    torch.empty_like(values, device=device),
                )
            self._targets.append(target)

    def _copy(self, layer: int, lane: Lane, end: int) -> None:
        """Send a layer's tokens up to ``end`` that were not sent before."""
        pairs = list(zip(self._staging[layer], self._targets[layer], strict=True))
        if end - self._sent < self._total:
            # Only memory that lies together is copied without a detour.
            tokens = slice(self._sent, end)
            pairs = [
                (source[head, tokens], target[head, tokens])
                for source, target in pairs
                for head in range(len(source))
            ]
        lane.copy(pairs)
