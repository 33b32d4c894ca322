"""States on their way to an accelerator: layer by layer, beside the compute that reads them.

Copies of one context set go to a stream of their own, first layer first, out of pinned memory. An
event stands behind each layer; the cache waits for it before the layer is first read, so that the
first layers compute while the later ones still arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]


class Arrival(Protocol):
    """The moment at which a layer's states have arrived."""

    def wait(self) -> None:
        """Let whatever this thread gives the device from now on come after it; returns at once."""

    def settle(self) -> None:
        """Block this thread until it has come."""


class Lane(Protocol):
    """Copies to one device that run one after the other, beside its other work."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy from pinned CPU memory to the device; returns at once."""

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
        # Targets may lie in memory that earlier work on the current stream still reads.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy from pinned CPU memory to the device; returns at once."""
        with torch.cuda.stream(self._stream):
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


def send(
    staging: Layers, devices: Sequence[torch.device], open_lane: OpenLane
) -> tuple[Layers, list[Arrival | None]]:
    """Start copying all layers to their devices, first to last.

    Parameters
    ----------
    staging : list of (Tensor, Tensor)
        Per layer, keys and values in CPU memory, pinned for lanes; not to be written before the
        arrivals.
    devices : sequence of torch.device
        One per layer.
    open_lane : callable
        Opens a lane to a device. Without one, a layer is copied at once; on the CPU it stays what
        it is.

    Returns
    -------
    tuple of list of (Tensor, Tensor) and list of Arrival or None
        The layers on their devices, and what to wait for before each is read; None: nothing.
    """
    lanes = {device: open_lane(device) for device in dict.fromkeys(devices)}
    layers: Layers = []
    arrivals: list[Arrival | None] = []
    for (keys, values), device in zip(staging, devices, strict=True):
        lane = lanes[device]
        if lane is None:
            layers.append((keys.to(device), values.to(device)))
            arrivals.append(None)
            continue
        targets = (torch.empty_like(keys, device=device), torch.empty_like(values, device=device))
        lane.copy(keys, targets[0])
        lane.copy(values, targets[1])
        layers.append(targets)
        arrivals.append(lane.mark())
    return layers, arrivals
