"""Print the tables of docs/quality.md from reports of ``ape-integrations eval --json``.

::

    python tools/quality_tables.py docs/quality.json --metric match
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ape_integrations.evaluation.metrics import METRICS
from ape_integrations.evaluation.report import is_report


def main(argv: Sequence[str] | None = None) -> None:
    """Print scores, differences and seconds as Markdown tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--metric", default="match", choices=METRICS)
    arguments = parser.parse_args(argv)
    try:
        report = json.loads(arguments.report.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {arguments.report}: {error}")
    if not is_report(report):
        parser.error(f"{arguments.report} is no report of `ape-integrations eval --json`")
    metric = arguments.metric

    def score(figures: Mapping[str, Any]) -> str:
        if metric not in figures:
            return "-"
        s = figures[metric]
        return f"{100 * s['mean']:.0f} ({100 * s['low']:.0f}-{100 * s['high']:.0f})"

    def difference(figures: Mapping[str, Any]) -> str:
        against = figures.get("against_sequential") or {}
        if metric not in against:
            return ""
        d = against[metric]["difference"]
        sure = "**" if d["low"] > 0 or d["high"] < 0 else ""
        return (
            f"{sure}{100 * d['mean']:+.0f}{sure} ({100 * d['low']:+.0f} to {100 * d['high']:+.0f})"
        )

    def kept(figures: Mapping[str, Any]) -> str:
        against = figures.get("against_sequential") or {}
        share = against[metric]["kept"] if metric in against else None
        return f"{100 * share['mean']:.1f}" if share else ""

    def seconds(figures: Mapping[str, Any]) -> str:
        if "first_token" not in figures:
            return "-"
        against = figures.get("against_sequential")
        share = f" ({100 * against['first_token']:.0f} %)" if against else ""
        return f"{1000 * figures['first_token']:.0f}{share}"

    for title, cell in (
        ("Score, % (95 % interval)", score),
        ("Difference to sequential, points (95 % interval)", difference),
        ("Share of sequential kept, %", kept),
        ("Milliseconds to the first token (share of sequential)", seconds),
    ):
        print(f"\n{title}\n")
        print(table(report, cell))


def table(report: Mapping[str, Any], cell: Callable[[Mapping[str, Any]], str]) -> str:
    """Return one table: a row per task and number of contexts, a column per mode."""
    labels = list(report["modes"])
    lines = [
        "| task | contexts | " + " | ".join(f"`{label}`" for label in labels) + " |",
        "|---|---:|" + "---:|" * len(labels),
    ]
    for row in report["rows"]:
        cells = [cell(row["modes"][label]) for label in labels]
        lines.append(f"| {row['task']} | {row['documents']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
