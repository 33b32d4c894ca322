"""The example runs from its command line, on a cold store and on a warm one."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_index.retrievers.bm25")

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quickstart_runs_cold_and_warm(
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name in ("lamp", "boat", "map"):
        text = f"The {name} is kept in the {name} room. Its keeper is Dora."
        (tmp_path / "data" / f"{name}.txt").write_text(text)
    turn = {"question": "Where is the lamp?", "answer": "In the lamp room."}
    questions = [turn, {"question": "And the boat?", "answer": "boat room", "history": [turn]}]
    (tmp_path / "data" / "questions.json").write_text(json.dumps(questions))
    arguments = ["--model", "model", "--data", "data", "--cache-dir", "cache"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart", *arguments, "--max-new-tokens", "4"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for hits in ("0/3", "3/3"):
        runpy.run_path(str(EXAMPLES / "quickstart_llamaindex.py"), run_name="__main__")
        printed = capsys.readouterr().out
        assert "Where is the lamp?" in printed
        assert "from lamp.txt" in printed
        rows = [line for line in printed.splitlines() if line.count("/3") == 2]
        assert len(rows) == 2
        assert all(hits in row and "3/3" in row for row in rows)
