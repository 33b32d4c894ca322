"""A run that was killed goes on where it stopped; answers of other settings are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.answers import AnswerLog
from ape_integrations.evaluation.modes import Answer, Mode, parse_mode
from ape_integrations.evaluation.prompts import Case
from ape_integrations.evaluation.report import disagreements, print_report, save_plot
from ape_integrations.evaluation.runner import run, summarise

SETTINGS = {"model": "m", "stop": ["\n"]}
ROWS = [
    [Case("single", n, "p", ("a",) * n, f"q{i}", (f"right {i}",)) for i in range(4)] for n in (1, 2)
]
MODES = [parse_mode("sequential"), parse_mode("ape")]


class FakeRunner:
    """Sequential is right but once; APE is right on even questions, four times as fast."""

    model = None

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self._left = fail_after

    def answer(self, mode: Mode, case: Case) -> Answer:
        self.asked.append((case.digest, mode.label))
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
        number = int(case.query[1:])
        right = number != 3 if mode.name == "sequential" else number % 2 == 0
        if case.documents == 2 and number == 0 and mode.name == "sequential":
            return Answer(None)
        seconds = 0.4 if mode.name == "sequential" else 0.1
        text = case.answers[0] if right else "wrong"
        return Answer(text, seconds, seconds + 1, 10, encode=0.2 if mode.name == "ape" else None)

    def likelihood(self, mode: Mode, case: Case) -> float:
        return 0.5 if mode.name == "sequential" else 0.25


def complete(path: Path | None, runner: Any, likelihood: bool = False) -> list[dict[str, Any]]:
    log = AnswerLog(path, SETTINGS)
    try:
        run(runner, ROWS, MODES, log, likelihood=likelihood)
        return summarise(ROWS, MODES, log)
    finally:
        log.close()


def test_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        complete(path, FakeRunner(fail_after=7))  # two of them warm up
    with path.open("a") as file:
        file.write('{"case": "half a li')
    second = FakeRunner()
    resumed = complete(path, second)
    assert resumed == complete(None, FakeRunner())
    assert len(second.asked) == 16 - 5 + 2
    third = FakeRunner()
    assert complete(path, third) == resumed
    assert third.asked == []
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_likelihood_is_added_to_a_file_without(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    without = complete(path, FakeRunner())
    assert all("likelihood" not in row["modes"]["ape"] for row in without)
    runner = FakeRunner()
    first, _ = complete(path, runner, likelihood=True)
    assert len(runner.asked) == 15 + 2  # but for the one that does not fit
    assert first["modes"]["sequential"]["likelihood"]["mean"] == 0.5
    against = first["modes"]["ape"]["against_sequential"]
    assert against["likelihood"]["difference"]["mean"] == -0.25
    assert against["match"] == without[0]["modes"]["ape"]["against_sequential"]["match"]
    again = FakeRunner()
    assert complete(path, again, likelihood=True)[0] == first
    assert again.asked == []


def test_modes_may_be_added_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    complete(path, FakeRunner())
    log, runner = AnswerLog(path, SETTINGS), FakeRunner()
    added = parse_mode("recompute=0.5")
    run(runner, ROWS, [*MODES, added], log)  # type: ignore[arg-type]
    log.close()
    assert {label for _, label in runner.asked[3:]} == {added.label}


def test_answers_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    complete(path, FakeRunner())
    with pytest.raises(ConfigError, match=r"stop was \['\\n'\], is \[\]. Name another file"):
        AnswerLog(path, {**SETTINGS, "stop": []})


def test_label_that_meant_another_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    complete(path, FakeRunner())
    log = AnswerLog(path, SETTINGS)
    with pytest.raises(ConfigError, match="mode 'ape' on file were given with"):
        log.use(MODES[1], {"meaning": "x", "config": {"attention_temperature": 0.5}})


@pytest.mark.parametrize("text", ["no JSON\n", "[]\n", '{"rows": []}\n', "half a line"])
def test_file_of_something_else_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no file of answers"):
        AnswerLog(path, SETTINGS)
    assert path.read_text() == text


def test_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot use"):
        AnswerLog(tmp_path / "nowhere" / "a.jsonl", SETTINGS)


def test_summary_compares_with_sequential_on_the_same_cases() -> None:
    first, second = complete(None, FakeRunner())
    assert (first["task"], first["documents"], first["cases"]) == ("single", 1, 4)
    assert first["encode_seconds"] == 0.2
    sequential, ape = first["modes"]["sequential"], first["modes"]["ape"]
    assert sequential["match"]["mean"] == 0.75
    assert "against_sequential" not in sequential
    against = ape["against_sequential"]
    assert against["first_token"] == 0.25
    assert against["match"]["difference"]["mean"] == -0.25
    assert against["match"]["kept"]["mean"] == pytest.approx(2 / 3, abs=1e-4)
    # One prompt did not fit: it counts for the mode that could answer, and in no comparison.
    assert second["modes"]["sequential"]["answered"] == 3
    assert second["modes"]["ape"]["answered"] == 4
    assert second["modes"]["ape"]["against_sequential"]["cases"] == 3


def report() -> dict[str, Any]:
    return {"model": "m", "rows": complete(None, FakeRunner())}


def test_table_shows_scores_comparison_and_what_was_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report(report(), ["match", "f1"])
    shown = capsys.readouterr().out
    assert shown.count("single") == 5
    assert "66.7 100.0 ms 25 %" in " ".join(shown.split())
    assert "sequential: 1 of 4 prompts do not fit" in shown


def test_plot_is_an_image(tmp_path: Path) -> None:
    save_plot(report(), "match", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rerun_is_checked_against_the_intervals() -> None:
    old, new = report(), report()
    assert disagreements(old, new) == []
    new["rows"][0]["modes"]["ape"]["f1"]["mean"] = 0.99
    [line] = disagreements(old, new)
    assert line.startswith("single, 1 contexts, ape: f1 is 0.990, outside [")
    del new["rows"][0]
    assert disagreements(old, new) == []
