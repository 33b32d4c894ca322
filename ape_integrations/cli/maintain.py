"""Commands that change a store: ``verify``, ``prune`` and ``clear``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ape_integrations.cli.options import (
    AsJson,
    CacheDir,
    Trust,
    existing_store,
    open_existing,
    parse_duration,
    print_json,
)
from ape_integrations.errors import ConfigError

if TYPE_CHECKING:
    from ape_integrations.store.maintenance import VerifyReport


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(verify)
    app.command()(prune)
    app.command()(clear)


def verify(
    cache_dir: CacheDir = None,
    repair: Annotated[bool, typer.Option(help="Drop what is bad, or only report it.")] = True,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Read every entry of a store and repair what is wrong.

    With --no-repair nothing on disk changes; opening a store for use would mend it already.

    The status is 1 where something is wrong and was not repaired.
    """
    if repair:
        with open_existing(cache_dir, trust) as store:
            report = store.verify().including(store.mended)
    else:
        report = _inspect(existing_store(cache_dir, trust))
    if as_json:
        print_json({"clean": report.clean, **asdict(report)})
    else:
        typer.echo(f"{report.checked} entries are good, {report.skipped} of another version.")
        for problem, found in (
            ("damaged entry", report.corrupted),
            ("entry without a file", report.missing),
            ("file of a killed writer", report.orphans),
            ("index", report.index_errors),
        ):
            for item in found:
                typer.echo(f"{problem}: {item}{' (repaired)' if report.repaired else ''}")
    if not report.clean and not report.repaired:
        raise typer.Exit(1)


def prune(
    cache_dir: CacheDir = None,
    older_than: Annotated[
        str | None, typer.Option(help='Remove what was not used for so long, such as "30d".')
    ] = None,
    model: Annotated[
        str | None, typer.Option(help='Remove entries of this model; "llama*" is a pattern.')
    ] = None,
    to_size: Annotated[
        str | None, typer.Option(help='Then remove until no more is left, such as "5GB".')
    ] = None,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Remove entries that are old, of one model, or too many.

    With both --older-than and --model, entries must be both.
    """
    if older_than is None and model is None and to_size is None:
        raise ConfigError("Say what to remove: --older-than, --model or --to-size.")
    seconds = parse_duration(older_than) if older_than is not None else None
    with open_existing(cache_dir, trust) as store:
        removed = store.prune(older_than=seconds, tag=model, to_size=to_size)
        left = store.stats()
    _report_removed(removed, left.entries, left.bytes, as_json)


def clear(
    cache_dir: CacheDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Remove all entries of a store, and the passages that chatbots keep beside them."""
    from ape_integrations.chatbot.library import forget_passages

    with open_existing(cache_dir, trust) as store:
        if not yes:
            count = store.stats().entries
            typer.confirm(f"Remove {count} entries from {store.directory}?", abort=True, err=True)
        removed = store.clear(all_namespaces=True)
        left = store.stats()
        folders = forget_passages(store.directory)
    if folders and not as_json:
        typer.echo(f"Removed the passages that chatbots kept of {folders} folders.")
    _report_removed(removed, left.entries, left.bytes, as_json)


def _inspect(directory: Path) -> VerifyReport:
    from ape_integrations.store.maintenance import inspect_store

    return inspect_store(directory)


def _report_removed(removed: int, entries: int, nbytes: int, as_json: bool) -> None:
    from ape_integrations.store.sizes import format_size

    if as_json:
        print_json({"removed": removed, "entries": entries, "bytes": nbytes})
    else:
        typer.echo(f"Removed {removed} entries; {entries} are left ({format_size(nbytes)}).")
