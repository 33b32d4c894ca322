"""The documentation builds without a warning, fetches nothing, and holds what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ape_integrations
from ape_integrations import store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as ``make docs`` does."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?(https?:)?//", html)
        sheets = [link for link in re.findall(r"<link\b[^>]*>", html) if "stylesheet" in link]
        assert not loaded, page
        assert not any("//" in sheet for sheet in sheets), page


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = "".join(page.read_text("utf-8") for page in (site / "reference").rglob("*.html"))
    anchors = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="([\w.]+)"', text)}
    names = {*ape_integrations.__all__, *store.__all__} - {"__version__"}
    assert not names - anchors


def test_every_command_is_in_the_reference(site: Path) -> None:
    from ape_integrations.cli import app

    page = (site / "command-line" / "index.html").read_text(encoding="utf-8")
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert f"<code>ape-integrations {name}</code>" in page, name


def test_figures_are_what_the_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import draw_figures

    drawn = {file.name: file.read_text("utf-8") for file in draw_figures.FOLDER.glob("*.svg")}
    monkeypatch.setattr(draw_figures, "FOLDER", tmp_path / "docs" / "figures")
    draw_figures.main([])
    again = {file.name: file.read_text("utf-8") for file in draw_figures.FOLDER.glob("*.svg")}
    assert drawn == again
