"""What mkdocs does besides building pages: write the command line's reference."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from ape_integrations.benchmark.command import build_parser

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the reference of all commands where a page has the mark."""
    return markdown.replace(MARK, _commands()) if MARK in markdown else markdown


def _commands() -> str:
    command = [sys.executable, "-m", "typer", "ape_integrations.cli", "utils", "docs"]
    done = subprocess.run(
        [*command, "--name", "ape-integrations"], capture_output=True, text=True, check=True
    )
    # The first part is the list of commands, which the page's own table of contents shows.
    sections = done.stdout.split("\n## ")[1:]
    options = build_parser("ape-integrations bench").format_help()
    return "".join(
        f"\n## {section}\n```text\n{options}```\n"
        if section.startswith("`ape-integrations bench`")
        else f"\n## {section}"
        for section in sections
    )
