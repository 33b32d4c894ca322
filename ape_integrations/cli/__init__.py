"""The command ``ape-integrations``.

Every module named in `MODULES` adds its commands to the app. A module imports torch, the store and
whatever else is slow inside its commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from ape_integrations.errors import APEError

MODULES = (
    "ape_integrations.cli.show",
    "ape_integrations.cli.maintain",
    "ape_integrations.cli.warm",
    "ape_integrations.cli.measure",
    "ape_integrations.cli.evaluate",
    "ape_integrations.cli.chat",
)
"""Each has a function ``register(app)``."""

app = typer.Typer(
    name="ape-integrations",
    help="Key/value states of retrieved texts: warm, look after, and measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for _module in MODULES:
    import_module(_module).register(app)


def main() -> None:
    """Run the command line; errors meant for people end it with their message and status 1."""
    try:
        app()
    except APEError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
