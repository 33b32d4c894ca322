"""The table that the quickstarts print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Report = Mapping[str, Any]
"""What ``GenerationResult.report()`` gives; LlamaIndex: ``raw["ape"]``."""


def print_table(
    rows: Sequence[tuple[str, Report, Report]],
    sequential: Sequence[float] | None = None,
    console: Console | None = None,
) -> None:
    """Print time to first token and hits, one line per question.

    Parameters
    ----------
    rows : sequence of (str, mapping, mapping)
        The question, and the reports of asking it first and a second time.
    sequential : sequence of float, optional
        Seconds to the first token of the same model without APE, one for each row.
    console : Console, optional
        Where to print.
    """
    console = console or Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Milliseconds to first token", max_width=console.width - 52, no_wrap=True)
    if sequential is not None:
        table.add_column("no APE", justify="right", min_width=6)
    for name in ("first", "again"):
        table.add_column(name, justify="right", min_width=5)
        table.add_column("hits", justify="right", min_width=4)
    if sequential is not None:
        table.add_column("faster", justify="right", min_width=6, style="bold")
    for index, (label, first, second) in enumerate(rows):
        cells = [label]
        if sequential is not None:
            cells.append(_milliseconds(sequential[index]))
        for report in (first, second):
            hits = f"{report['hits']}/{report['contexts']}"
            cells += [_milliseconds(report["first_token_seconds"]), hits]
        if sequential is not None:
            cells.append(f"{sequential[index] / second['first_token_seconds']:.1f}x")
        table.add_row(*cells)
    console.print(table)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"
