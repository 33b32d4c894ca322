"""``bench --growth``: what each size took, measured in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ape_integrations.benchmark import growth as growing
from ape_integrations.benchmark.command import main
from ape_integrations.benchmark.growth import Source, growth
from ape_integrations.benchmark.report import print_growth, save_growth
from ape_integrations.benchmark.runner import Workload

SMALL = ["--shape", "tiny", "--context-tokens", "16", "--query-tokens", "4", "--device", "cpu"]
SOURCE = Source(None, "tiny", "float32", "cpu", None)


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run in this process, which is sooner done."""
    return function(*arguments)


def test_each_size_is_measured_in_a_fresh_process(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--growth", "64", "--modes", "ape disk", "--repetitions", "1", "--json"])
    [row] = json.loads(capsys.readouterr().out)["results"]
    assert row["workload"]["contexts"] == 4
    assert row["kv_bytes"] == row["kv_in_use"] == 4 * 16 * 2 * 2 * 2 * 16 * 4
    assert row["first_token"] > 0
    if row["peak_bytes"] is not None:
        assert row["peak_bytes"] > row["model_bytes"] > row["kv_bytes"]
        assert row["overhead"] == (row["peak_bytes"] - row["model_bytes"]) / row["kv_in_use"]


def test_every_mode_and_size_has_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(growing, "_in_fresh_process", here)
    workloads = [Workload(count, 16, 4, 4) for count in (2, 4)]
    rows = growth(SOURCE, workloads, growing.MODES, repetitions=2)
    assert [(row["workload"]["contexts"], row["mode"]) for row in rows] == [
        (count, mode) for count in (2, 4) for mode in growing.MODES
    ]
    copies = {row["mode"]: row["kv_in_use"] / row["kv_bytes"] for row in rows}
    assert copies == {"ape disk": 1, "ape ram": 2, "sequential": 1}
    console = Console(width=120, record=True)
    print_growth(rows, console)
    text = console.export_text()
    assert all(mode in text for mode in growing.MODES) and "x KV" in text
    save_growth(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_states_that_are_not_found_again_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(growing, "_in_fresh_process", here)
    monkeypatch.setattr(growing, "_fill", lambda *_: None)
    with pytest.raises(RuntimeError, match="not found again"):
        growth(SOURCE, [Workload(2, 16, 4, 4)], ["ape disk"], repetitions=1)


@pytest.mark.parametrize("arguments", [["--growth", "0"], ["--growth", "--modes", "floor"]])
def test_bad_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*SMALL, *arguments])
    assert "error" in capsys.readouterr().err
