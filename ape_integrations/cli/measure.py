"""Commands that measure: ``bench`` and ``eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from ape_integrations.cli.options import AsJson, print_json, print_table
from ape_integrations.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        "bench",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(bench)
    app.command("eval")(evaluate)


def bench(context: typer.Context) -> None:
    """Time APE against sequential prefill, side by side in one run."""
    from ape_integrations.benchmark.command import main

    main(context.args, prog="ape-integrations bench")


def evaluate(
    demo: Annotated[
        bool, typer.Option("--demo", help="Held-out tasks of the bundled model's world.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Another model for these tasks. Default: the bundled one.")
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="sequential, parallel or ape; repeat for several. Default: all."),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind of question; repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Cases per row.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the cases.")] = 7,
    as_json: AsJson = False,
) -> None:
    """Score answers: exact match, sequential prompts against parallel encoding and APE."""
    if not demo:
        raise ConfigError("Say what to evaluate on: --demo is the bundled model's world.")
    from ape_integrations.evaluation.modes import MODES, compare

    modes = mode or list(MODES)
    unknown = [name for name in modes if name not in MODES]
    if unknown:
        raise ConfigError(f"Unknown mode {unknown[0]!r}. Choose from: {', '.join(MODES)}.")
    scores = compare(model, modes, samples=samples, seed=seed, kinds=kind)
    if as_json:
        print_json(scores)
        return
    rows = [
        [row["task"], str(row["documents"]), *(f"{row[name]:.1%}" for name in modes)]
        for row in scores["rows"]
    ]
    print_table(["task", "documents", *modes], rows)
