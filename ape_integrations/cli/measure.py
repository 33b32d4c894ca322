"""The command that measures times: ``bench``."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        "bench",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(bench)


def bench(context: typer.Context) -> None:
    """Time APE against sequential prefill, side by side in one run."""
    from ape_integrations.benchmark.command import main

    main(context.args, prog="ape-integrations bench")
