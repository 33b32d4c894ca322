"""The quickstart runs as a user would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quickstart_reuses_everything_the_second_time(tmp_path: Path) -> None:
    command = [sys.executable, "examples/quickstart_langchain.py", "--questions", "2"]
    run = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "store"), "--max-new-tokens", "8"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    for pipeline in ("LCEL chain", "Retrieval chain with history", "Agent with a retriever tool"):
        assert pipeline in run.stdout
    # Hits of contexts: the last such pair of a line is that of the second time.
    rows = [re.findall(r"(\d+)/(\d+)", line) for line in run.stdout.splitlines()]
    second = [pairs[1] for pairs in rows if len(pairs) == 2]
    assert len(second) == 6
    assert all(hits == contexts != "0" for hits, contexts in second)
    assert "6 of 6 answers are word for word" in re.sub(r"\s+", " ", run.stdout)
