"""Tables and plots of scores, and the comparison of two reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ape_integrations.evaluation.metrics import LIKELIHOOD, METRICS
from ape_integrations.outputs import check_plotting

Report = Mapping[str, Any]

_COLUMNS = ("score", "interval", "gain", "interval", "kept", "1st token", "time")
_FILE_WIDTH = 120


def print_report(report: Report, metrics: Sequence[str], console: Console | None = None) -> None:
    """Print one table per metric.

    Scores; gain over sequential and share of it that is kept; time to the first token, and how much
    that is of sequential's.
    """
    console = console or _console()
    for metric in metrics:
        table = Table(
            title=f"{report['model']}: {METRICS[metric]}, %",
            box=box.SIMPLE,
            pad_edge=False,
        )
        for name in ("task", "texts", "mode", *_COLUMNS):
            left = name in ("task", "mode")
            table.add_column(name, no_wrap=True, justify="left" if left else "right")
        for row in report["rows"]:
            head = [row["task"], f"{row['documents']:g}"]
            for label, figures in row["modes"].items():
                table.add_row(*head, label, *_cells(figures, metric))
                head = ["", ""]
            table.add_section()
        console.print(table)
    console.print("Intervals are of 95 %; gain, kept and time are against sequential.")
    for row in report["rows"]:
        for label, figures in row["modes"].items():
            left_out = row["cases"] - figures["answered"]
            if left_out:
                console.print(
                    f"{row['task']}, {label}: {left_out} of {row['cases']} prompts do not fit the "
                    "model; they count in no score of this mode."
                )
            if too_long := figures.get("too_long", 0):
                console.print(
                    f"{row['task']}, {label}: {too_long} of {row['cases']} accepted answers do not "
                    f"fit the model behind their prompts; they count in no {LIKELIHOOD} of this "
                    "mode."
                )


def _console() -> Console:
    """Return a console; into a file, tables are as wide as they need be."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def _cells(figures: Mapping[str, Any], metric: str) -> list[str]:
    if metric not in figures:
        return ["-"] * len(_COLUMNS)
    score = figures[metric]
    cells = [f"{100 * score['mean']:.1f}", f"{100 * score['low']:.1f} {100 * score['high']:.1f}"]
    against = figures.get("against_sequential")
    if against is None or metric not in against:
        return [*cells, "", "", "", seconds(figures["first_token"]), ""]
    d, kept = against[metric]["difference"], against[metric]["kept"]
    return [
        *cells,
        f"{100 * d['mean']:+.1f}",
        f"{100 * d['low']:+.1f} {100 * d['high']:+.1f}",
        "-" if kept is None else f"{100 * kept['mean']:.1f}",
        seconds(figures["first_token"]),
        f"{100 * against['first_token']:.0f} %",
    ]


def seconds(value: float) -> str:
    """Write a duration in the unit that suits it."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def save_plot(report: Report, metric: str, path: Path) -> None:
    """Plot scores with their intervals over the number of contexts, one panel per task.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    tasks: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        tasks.setdefault(row["task"], []).append(row)
    width = max(6.5, 3.6 * len(tasks))
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, (task, rows) in zip(panels, tasks.items(), strict=True):
        _draw(panel, task, rows, metric)
    panels[0].set(ylabel=f"{metric} (%)", ylim=(0, 102))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=int(width / 1.6))
    figure.savefig(path, dpi=150)


def _draw(panel: Any, task: str, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    labels = list(rows[0]["modes"])
    for number, label in enumerate(labels):
        points = [
            (row["documents"], row["modes"][label][metric])
            for row in rows
            if metric in row["modes"][label]
        ]
        if not points:
            continue
        # Side by side, so that intervals can be told apart; the axis is logarithmic.
        shift = 1.025 ** (number - (len(labels) - 1) / 2)
        means = [100 * score["mean"] for _, score in points]
        below = [100 * max(0.0, score["mean"] - score["low"]) for _, score in points]
        above = [100 * max(0.0, score["high"] - score["mean"]) for _, score in points]
        places = [documents * shift for documents, _ in points]
        panel.errorbar(
            places, means, [below, above], fmt="o-", markersize=3, linewidth=1, label=label
        )
    counts = [row["documents"] for row in rows]
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [f"{count:g}" for count in counts])
    panel.set(title=task, xlabel="contexts")
    panel.grid(alpha=0.3)


def disagreements(old: Report, new: Report) -> list[str]:
    """Return where a rerun's means leave the 95 % intervals of an earlier report.

    Parameters
    ----------
    old, new : dict
        The report, and its rerun; rows and modes that the rerun lacks are left out.

    Returns
    -------
    list of str
        One sentence for each, and for what the rerun has and cannot be compared: a row or a mode of
        its own, a metric that nothing could be scored by any more, a mode without any mean.
    """
    earlier = {(row["task"], row["documents"]): row["modes"] for row in old["rows"]}
    compared: dict[str, int] = {label: 0 for row in new["rows"] for label in row["modes"]}
    found = []
    for row in new["rows"]:
        modes = earlier.get((row["task"], row["documents"]))
        if modes is None:
            found.append(f"{_place(row)}: not compared, the earlier report has no such row")
            continue
        for label, figures in row["modes"].items():
            known = modes.get(label, {})
            found += [f"{_place(row)}, {label}: {each}" for each in _changes(known, figures)]
            compared[label] += len(METRICS.keys() & known.keys() & figures.keys())
    return found + [
        f"{label}: not compared, there is no mean of it in both reports"
        for label, means in compared.items()
        if not means
    ]


def _place(row: Mapping[str, Any]) -> str:
    return f"{row['task']}, {row['documents']} contexts"


def _changes(known: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """Return what has changed in one mode of one row."""
    found = []
    for metric in METRICS:
        if metric not in known:
            continue
        low, high = (float(known[metric][end]) for end in ("low", "high"))
        if metric not in figures:
            found.append(f"{metric} was not compared, no prompt and answer fits the model")
        elif not low <= figures[metric]["mean"] <= high:
            mean = figures[metric]["mean"]
            found.append(f"{metric} is {mean:.3f}, outside [{low:.3f}, {high:.3f}]")
    return found


def is_report(report: Any) -> bool:
    """Tell whether a value is a report with a mean that a rerun can be compared with."""
    try:
        disagreements(report, report)
        return bool(measured(report) and list(report["modes"].keys()))
    except (TypeError, KeyError, AttributeError, ValueError):
        return False


def measured(report: Report) -> set[str]:
    """Return the metrics that a report holds."""
    return {
        metric
        for row in report["rows"]
        for figures in row["modes"].values()
        for metric in METRICS
        if metric in figures
    }


def print_tuning(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the grid, and what the choice of T and S gains on cases it has not seen."""
    console = console or _console()
    table = Table(title=f"{result['model']}: {METRICS[result['metric']]}, {result['cases']} cases")
    for name in ("T", "S", "score %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["grid"]:
        table.add_row(
            f"{row['attention_temperature']:g}",
            f"{row['scaling_factor']:g}",
            f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
        )
    console.print(table)
    best, gain = result["best"], result["gain"]
    console.print(
        f"Best on the sample: T = {best['attention_temperature']:g}, "
        f"S = {best['scaling_factor']:g}. Gain over the defaults on cases that the choice had not "
        f"seen: {100 * gain['mean']:+.1f} points, 99 % interval {100 * gain['low']:+.1f} to "
        f"{100 * gain['high']:+.1f}."
    )
    console.print(
        "Recommended."
        if result["recommended"]
        else "Chance alone could explain that: the defaults stay."
    )
