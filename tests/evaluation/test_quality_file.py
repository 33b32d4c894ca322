"""The committed results are those of the shipped model, and a rerun of them agrees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ape_integrations.evaluation.command import report
from ape_integrations.evaluation.report import disagreements
from ape_integrations.evaluation.setup import Setup

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("name", ["quality.json", "quality-hard.json"])
def test_rerun_of_some_rows_agrees_with_the_committed_file(name: str) -> None:
    """All rows take minutes: ``make quality``."""
    committed: dict[str, Any] = json.loads((DOCS / name).read_text())
    whole = Setup.from_json(committed["setup"])
    setup = replace(whole, kinds=("few-shot",), contexts=(8,))
    labels = [label for label in committed["modes"] if label in ("sequential", "prefix", "ape")]
    rerun = report(setup, labels)
    assert rerun["environment"]["fingerprint"] == committed["environment"]["fingerprint"]
    assert [row["cases"] for row in rerun["rows"]] == [whole.samples]
    assert disagreements(committed, rerun) == []
