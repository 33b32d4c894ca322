"""The quickstart runs as a user would run it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quickstart_reuses_everything_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = EXAMPLES / "quickstart_langchain.py"
    arguments = ["--max-new-tokens", "8", "--cache-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("COLUMNS", "100")
    runpy.run_path(str(script), run_name="__main__")
    output = capsys.readouterr().out
    for pipeline in ("LCEL chain", "Retrieval chain with history", "Agent with a retriever tool"):
        assert pipeline in output
    # Hits of contexts: the last such pair of a line is that of the second time.
    rows = [re.findall(r"(\d+)/(\d+)", line) for line in output.splitlines()]
    second = [pairs[1] for pairs in rows if len(pairs) == 2]
    assert len(second) >= 10
    assert all(hits == contexts != "0" for hits, contexts in second)
    count = len(second)
    assert f"{count} of {count} answers are word for word" in re.sub(r"\s+", " ", output)
