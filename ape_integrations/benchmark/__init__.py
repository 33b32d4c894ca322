"""Time to first token and decoding, APE against sequential prefill, side by side in one run."""

from __future__ import annotations
