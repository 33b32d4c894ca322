"""What holds for torch while the package computes, whatever the caller has set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# How torch compiles is set for all threads, and whoever leaves last must find what was there first.
_stance = threading.RLock()


@contextmanager
def computing() -> Iterator[None]:
    """Compute without gradients, in ordinary tensors.

    What is made under a caller's ``torch.inference_mode()`` could not be written to outside of it,
    and buffers and the states of earlier turns are.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run models as if ``torch.compile`` had not been called."""
    with _stance, torch.compiler.set_stance("force_eager"):
        yield
