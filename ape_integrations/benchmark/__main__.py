"""Command line of the benchmark: ``python -m ape_integrations.benchmark``."""

from __future__ import annotations

from ape_integrations.benchmark.command import main

if __name__ == "__main__":
    main()
