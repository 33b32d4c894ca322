"""docs/models.md lists exactly the families that the tests run."""

from __future__ import annotations

import re
from pathlib import Path

from tests.families.registry import REFUSED, SERVED
from tests.families.vision_language import REFUSED as VISION_REFUSED
from tests.families.vision_language import SERVED as VISION

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def rows(section: str) -> list[list[str]]:
    """Return the cells of a section's table."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_page_lists_every_family_that_is_served() -> None:
    """Written anew with `python tools/support_matrix.py` where it does not."""
    for section, families, columns in (
        ("Served", list(SERVED), 7),
        ("Served with text alone: vision-language models", list(VISION), 5),
    ):
        table = rows(section)
        assert [row[0] for row in table] == families
        assert all(row[3:] == ["yes"] * columns for row in table)


def test_page_gives_a_reason_for_every_refusal() -> None:
    table = rows("Refused")
    assert [row[0] for row in table] == [*REFUSED, *VISION_REFUSED]
    reasons = [family.refused for family in REFUSED.values()]
    reasons += [entry[3] for entry in VISION_REFUSED.values()]
    for row, reason in zip(table, reasons, strict=True):
        assert reason in row[2]


def test_page_reports_no_failure() -> None:
    assert not re.search(r"\*\*(no|not tested|\d+ failed)\*\*", PAGE.read_text(encoding="utf-8"))
