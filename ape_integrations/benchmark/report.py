"""Tables and plots of benchmark results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ape_integrations.outputs import check_plotting


def print_table(results: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print one table per workload.

    Medians, how many times faster than sequential they are, and the highest memory in GB.
    """
    console = console or Console()
    for result in results:
        work = result["workload"]
        table = Table(
            title=(
                f"{work['contexts']} contexts x {work['context_tokens']} tokens, "
                f"{work['new_tokens']} new tokens, {result['kv_bytes'] / 1e6:.0f} MB of KV states"
            ),
            padding=(0, 0, 0, 1),
        )
        table.add_column("mode")  # in a narrow terminal it is the names that break, not the figures
        for name in ("1st token", "ratio", "per token", "ratio", "total", "ratio", "GB"):
            table.add_column(name, justify="right", no_wrap=True)
        for mode, row in result["modes"].items():
            ratio = result["ratios"].get(mode, {})
            table.add_row(
                mode,
                _seconds(row["first_token"]),
                _times(ratio.get("first_token")),
                _seconds(row["decode"]),
                _times(ratio.get("decode")),
                _seconds(row["total"]),
                _times(ratio.get("total")),
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
            )
        console.print(table)


def print_growth(rows: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print what each size took: time to first token, and memory beyond the model's.

    "KV" are all copies of the states that a mode holds: one where they come from disk, two where a
    store keeps them in memory as well. "x KV" is the peak beyond the model's memory, divided by
    them; query, answer and working memory are part of it.
    """
    table = Table(title="Growth with the context tokens; each row in a fresh process")
    table.add_column("mode", no_wrap=True)
    for name in ("tokens", "1st token", "per 1K", "model", "KV", "peak", "x KV"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: str(row["mode"])):
        tokens = _context_tokens(row)
        table.add_row(
            row["mode"],
            str(tokens),
            _seconds(row["first_token"]),
            _seconds(row["first_token"] / tokens * 1024),
            _megabytes(row["model_bytes"]),
            _megabytes(row["kv_in_use"]),
            _megabytes(row["peak_bytes"]),
            "" if row["overhead"] is None else f"{row['overhead']:.2f}",
        )
    (console or Console()).print(table)


def save_growth(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot time to first token over context tokens, as `save_plot` does.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    results: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=_context_tokens):
        result = results.setdefault(
            _context_tokens(row), {"workload": row["workload"], "modes": {}}
        )
        result["modes"][row["mode"]] = row
    save_plot(list(results.values()), path)


def _context_tokens(row: dict[str, Any]) -> int:
    return int(row["workload"]["contexts"] * row["workload"]["context_tokens"])


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.0f} MB"


def save_plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot time to first token over context tokens, both axes logarithmic.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for mode in results[0]["modes"]:
        points = [
            (r["workload"]["contexts"] * r["workload"]["context_tokens"], r["modes"][mode])
            for r in results
            if mode in r["modes"]
        ]
        axes.plot([x for x, _ in points], [y["first_token"] for _, y in points], "o-", label=mode)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="context tokens",
        ylabel="time to first token (s)",
        title="Time to first token",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"
