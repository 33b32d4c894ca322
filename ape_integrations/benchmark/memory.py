"""Memory of this process (CPU) or of the device (CUDA)."""

from __future__ import annotations

from pathlib import Path

import torch


def reset_peak() -> None:
    """Forget the highest memory so far, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int | None:
    """Return the highest memory since :func:`reset_peak`; None where nobody counts it."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def used_bytes() -> int | None:
    """Return the memory in use now; None where nobody counts it."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
