"""Fresh memory: zeros, in large pages where there are any, gone with its last view."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from ape_integrations.pages import fresh_memory

SIZE = 64 << 20


def flags_of(address: int) -> list[str] | None:
    """Return the kernel's flags of the mapping that holds an address; None where there is none."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            found = start <= address < end
        elif found and head == "VmFlags:":
            return line.split()[1:]
    return None


def test_memory_is_writable_zeros() -> None:
    for nbytes in (1, 4097, SIZE):
        memory = fresh_memory(nbytes)
        assert memory.dtype == torch.uint8 and memory.shape == (nbytes,)
        assert not memory.any()
        memory.fill_(7)
        assert int(memory[-1]) == 7
    assert fresh_memory(0).shape == (0,)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_memory_asks_for_large_pages_and_goes_back() -> None:
    memory = fresh_memory(SIZE)
    address = memory.data_ptr()
    flags = flags_of(address)
    assert flags is not None
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        assert "hg" in flags
    view = memory[10:20].view(torch.int16)
    del memory
    assert flags_of(address) is not None
    del view
    assert flags_of(address) is None


def test_a_system_without_large_pages_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    assert fresh_memory(SIZE).shape == (SIZE,)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.delattr(mmap, "MAP_PRIVATE", raising=False)
    assert fresh_memory(SIZE).shape == (SIZE,)
