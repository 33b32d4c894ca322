"""Fresh memory, in large pages where the system lets programs ask for them.

A system hands out memory page by page, when it is first written to. Pages of 4 KB take several
times as long as the copy that fills them; pages of 2 MB hardly any time.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor


def fresh_memory(nbytes: int) -> Tensor:
    """Map memory that goes back to the system when the last view of it is freed.

    Parameters
    ----------
    nbytes : int
        May be none.

    Returns
    -------
    Tensor
        ``(nbytes,)`` of uint8, zeros.

    Raises
    ------
    OSError
        No memory is left.
    """
    length = max(nbytes, 1)  # nothing cannot be mapped
    if hasattr(mmap, "MAP_PRIVATE"):
        # Neighbours that are private count as one of the system's mappings.
        mapped = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        mapped = mmap.mmap(-1, length)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8)[:nbytes]
