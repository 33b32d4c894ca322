"""``bench`` and ``warm``, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ape_integrations.benchmark.runner import MODES
from ape_integrations.cli import app
from ape_integrations.errors import ConfigError

SMALL = ["bench", "--shape", "tiny", "--context-tokens", "32", "--new-tokens", "3", "--json"]


def _run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_bench_reports_every_mode_side_by_side() -> None:
    result = _run(*SMALL, "--contexts", "2", "4", "--repetitions", "2")
    report = json.loads(result.stdout)
    assert [r["workload"]["contexts"] for r in report["results"]] == [2, 4]
    for measured in report["results"]:
        assert list(measured["modes"]) == list(MODES)
        for mode, figures in measured["modes"].items():
            assert figures["repetitions"] == 2
            assert figures["first_token"] > 0
            if mode.startswith("ape disk"):
                assert figures["bytes_loaded"] >= measured["kv_bytes"]
        assert measured["ratios"]["ape ram"]["first_token"] > 0


@pytest.mark.parametrize("arguments", [["--contexts", "0"], ["--shape", "huge"], ["--what"]])
def test_bench_refuses_bad_arguments(arguments: list[str]) -> None:
    result = _run(*SMALL, *arguments)
    assert result.exit_code == 2
    assert "error" in result.stderr


def test_warm_encodes_files_once(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"Document {number} is about welding.")
    arguments = ["warm", str(texts), "--cache-dir", str(tmp_path / "store"), "--json"]
    first = json.loads(_run(*arguments).stdout)
    assert first["nodes"] == 3
    assert first["entries"] >= first["entries_before"] + 3
    again = json.loads(_run(*arguments).stdout)
    assert again["entries"] == again["entries_before"] == first["entries"]


def test_warm_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        _run("warm", str(tmp_path / "nowhere"))
