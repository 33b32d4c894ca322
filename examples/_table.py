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
    """Print seconds to the first token and hits, one line per question.

    Parameters
    ----------
    rows : sequence of (str, mapping, mapping)
        The question, and the reports of asking it first and a second time.
    sequential : sequence of float, optional
        Seconds to the first token of the same model without APE, one for each row.
    console : Console, optional
        Where to print.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Seconds to the first token")
    table.add_column("", max_width=30, no_wrap=True, overflow="ellipsis")
    if sequential is not None:
        table.add_column("without APE", justify="right")
    for name in ("asked first", "asked again"):
        table.add_column(name, justify="right")
        table.add_column("hits", justify="right")
    if sequential is not None:
        table.add_column("sooner", justify="right", style="bold")
    for index, (label, first, second) in enumerate(rows):
        cells = [label]
        if sequential is not None:
            cells.append(f"{sequential[index]:.3f}")
        for report in (first, second):
            cells += [_seconds(report), f"{report['hits']}/{report['contexts']}"]
        if sequential is not None:
            cells.append(f"{sequential[index] / second['first_token_seconds']:.1f}x")
        table.add_row(*cells)
    (console or Console()).print(table)


def _seconds(report: Report) -> str:
    return f"{report['first_token_seconds']:.3f}"
