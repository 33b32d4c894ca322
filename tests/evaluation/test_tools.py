"""Tools say what they do, and what is wrong, without doing anything."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(module: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        module.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_help_draws_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tool("draw_figures")
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "docs" / "figures")
    with pytest.raises(SystemExit):
        figures.main(["--help"])
    assert "Draw the documentation's figures" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    figures.main([])
    assert len(list(figures.FOLDER.iterdir())) == 4


def questions(path: Path, count: int) -> Path:
    with gzip.open(path, "wt") as file:
        for number in range(count):
            passage = {"hasanswer": True, "title": "", "text": f"Ada {number} made lens {number}."}
            record = {
                "question": f"Who made lens {number}",
                "answers": [f"Ada {number}"],
                "ctxs": [passage],
            }
            file.write(json.dumps(record) + "\n")
    return path


def test_questions_are_drawn_from_a_small_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = questions(tmp_path / "nq.gz", 5)
    tool("public_data").main(["--count", "3", "nq", str(data), "--documents", "2"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(record["contexts"]) for record in records] == [2, 2, 2]


def test_public_data_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, module = questions(tmp_path / "nq.gz", 5), tool("public_data")
    sentences, empty = tmp_path / "dev.tsv", tmp_path / "empty.tsv"
    sentences.write_text("fine\t1\ndull\t0\n")
    empty.write_text("")
    (tmp_path / "other.tsv").write_text("sentence\tlabel\n")
    for arguments, message in (
        (["nq", tmp_path / "nowhere.gz"], "cannot read the data set: [Errno 2]"),
        (["nq", sentences], "cannot read the data set: Not a gzipped file"),
        (["--count", 6, "nq", data], "there are 5 to draw 6 from: lower --count"),
        (["--count", 0, "nq", data], "--count and --documents must be at least 1"),
        (["--count", 3, "sst2", sentences, sentences], "lower --count"),
        (["--count", 1, "sst2", sentences, sentences], "lower --examples"),
        (["sst2", tmp_path / "other.tsv", sentences], "not the data set that the tool is made for"),
    ):
        assert message in refusal(module, capsys, *arguments)


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def test_tables_have_a_dash_for_a_mode_that_answered_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ape: dict[str, Any] = {"answered": 2, "first_token": 0.01, "match": interval(0.5)}
    nothing = {"answered": 0}
    rows = [
        {"task": "a", "documents": 4, "modes": {"sequential": nothing, "ape": ape}},
        {"task": "b", "documents": 4, "modes": {"sequential": ape, "ape": nothing}},
    ]
    rows[0]["modes"]["ape"] = {**ape, "against_sequential": None}  # type: ignore[index]
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps({"modes": {"sequential": {}, "ape": {}}, "rows": rows}))
    tool("quality_tables").main([str(saved)])
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("| a | 4 | - | 50 (40-60) |") == 1
    assert lines.count("| b | 4 | 10 | - |") == 1


def test_tables_of_something_else_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, other = tool("quality_tables"), tmp_path / "other.json"
    assert "cannot read" in refusal(tables, capsys, tmp_path / "nowhere.json")
    other.write_text("[]")
    assert "is no report" in refusal(tables, capsys, other)
