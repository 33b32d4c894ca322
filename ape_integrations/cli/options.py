"""What the commands have in common: their options, durations, output for machines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ape_integrations.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from ape_integrations.store import DiskKVStore

CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="Directory of the store. Default: the user's cache."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Trust = Annotated[
    bool,
    typer.Option("--trust-directory", help="Accept a directory that others can write to."),
]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def open_existing(directory: Path | None, trust: bool) -> DiskKVStore:
    """Open a store to look after it, without creating one; arguments as for `existing_store`."""
    from ape_integrations.store import DiskKVStore

    return DiskKVStore(existing_store(directory, trust), trust_directory=trust)


def existing_store(directory: Path | None, trust: bool) -> Path:
    """Return the directory of a store, without opening or creating one.

    Parameters
    ----------
    directory : Path or None
        None takes the user's cache directory.
    trust : bool
        Accept a directory that somebody else owns or can write to.

    Raises
    ------
    StoreError
        If there is none, or if it is not to be trusted.
    """
    from ape_integrations.store.directory import INDEX_FILE, default_directory, prepare_directory

    path = directory.expanduser() if directory is not None else default_directory()
    if not any((path / name).exists() for name in (INDEX_FILE, "entries")):
        raise StoreError(f"There is no store in {path}. Name its directory with --cache-dir.")
    return prepare_directory(path, trust)


def parse_duration(text: str) -> float:
    """Turn ``"30d"``, ``"12h"``, ``"90m"`` or ``"45s"`` into seconds.

    Raises
    ------
    ConfigError
        If it is none of these; without a unit, days and seconds could be meant.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(
            f'{text!r} is not a duration with its unit; write for example "30d", "12h" or "90m".'
        )
    return float(match[1]) * _SECONDS[match[2]]


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns; the first is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        typer.echo("  ".join(cells).rstrip())


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, fields))
    for name, value in fields.items():
        typer.echo(f"{name.ljust(width)}  {value}")


def format_time(seconds: float | None) -> str:
    """Write a time as local date and time, a dash where there is none."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
