"""Commands that look at a store: ``stats`` and ``list``."""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Annotated

import typer

from ape_integrations.cli.options import (
    AsJson,
    CacheDir,
    Trust,
    format_time,
    open_existing,
    print_fields,
    print_json,
    print_table,
)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(stats)
    app.command("list")(list_entries)


def stats(cache_dir: CacheDir = None, as_json: AsJson = False, trust: Trust = False) -> None:
    """Show entries, bytes, hit rate and models of a store."""
    from ape_integrations.store.sizes import format_size

    with open_existing(cache_dir, trust) as store:
        figures = store.stats()
        directory = str(store.directory)
    if as_json:
        # The limit is a setting of whoever stores, not of the directory.
        values = asdict(figures)
        del values["size_limit"], values["tiers"]
        values["models"] = values.pop("tags")
        print_json({"directory": directory, "hit_rate": figures.hit_rate, **values})
        return
    print_fields(
        {
            "directory": directory,
            "entries": figures.entries,
            "size": format_size(figures.bytes),
            "hit rate": f"{figures.hit_rate:.1%} ({figures.hits} hits, {figures.misses} misses)",
            "evictions": figures.evictions,
            "corrupted": figures.corrupted,
            "not stored": figures.put_failures,
            "oldest": format_time(figures.oldest),
            "newest": format_time(figures.newest),
        }
    )
    if figures.tags:
        typer.echo()
        rows = [
            (tag or "-", str(model.entries), format_size(model.bytes), str(model.hits))
            for tag, model in sorted(figures.tags.items())
        ]
        print_table(("model", "entries", "size", "hits"), rows)


def list_entries(
    cache_dir: CacheDir = None,
    model: Annotated[
        str | None, typer.Option(help='Only entries of this model; "llama*" is a pattern.')
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Show so many at most, 0 for all.")] = 0,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """List the entries of a store, most recently used first."""
    from ape_integrations.store.sizes import format_size

    with open_existing(cache_dir, trust) as store:
        rows = store.rows(all_namespaces=True)[::-1]
    rows = [row for row in rows if model is None or fnmatchcase(row.tag, model)]
    rows = rows[:limit] if limit > 0 else rows
    if as_json:
        print_json(
            [
                {
                    "key": row.key,
                    "model": row.tag,
                    "bytes": row.nbytes,
                    "hits": row.hits,
                    "stored": row.stored,
                    "used": row.used,
                }
                for row in rows
            ]
        )
        return
    print_table(
        ("key", "model", "size", "hits", "stored", "last used"),
        [
            (
                row.key if len(row.key) <= 48 else f"{row.key[:47]}…",
                row.tag or "-",
                format_size(row.nbytes),
                str(row.hits),
                format_time(row.stored),
                format_time(row.used),
            )
            for row in rows
        ],
    )
