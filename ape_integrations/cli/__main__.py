"""``python -m ape_integrations.cli``, the same as the command ``ape-integrations``."""

from __future__ import annotations

from ape_integrations.cli import main

main()
