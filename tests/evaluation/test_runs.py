"""A run that was killed goes on where it stopped; answers of other settings are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ape_integrations.errors import ConfigError, ContextWindowError
from ape_integrations.evaluation.answers import AnswerLog
from ape_integrations.evaluation.modes import Answer, Mode, parse_mode
from ape_integrations.evaluation.prompts import Case
from ape_integrations.evaluation.report import (
    disagreements,
    is_report,
    print_report,
    save_plot,
)
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


class TooLong(FakeRunner):
    """The accepted answer to the second question does not fit behind any prompt."""

    def __init__(self, modes: tuple[str, ...] = ("sequential", "ape"), cases: str = "1") -> None:
        super().__init__()
        self._modes, self._cases = modes, cases

    def likelihood(self, mode: Mode, case: Case) -> float:
        if case.query[1:] in self._cases and mode.name in self._modes:
            raise ContextWindowError("The prompt does not fit.")
        return super().likelihood(mode, case)


def test_answer_that_does_not_fit_has_no_likelihood_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.jsonl"
    rows = complete(path, TooLong(), likelihood=True)
    for label in ("sequential", "ape"):
        figures = rows[0]["modes"][label]
        assert (figures["answered"], figures["too_long"]) == (4, 1)
    assert rows[0]["modes"]["ape"]["likelihood"]["mean"] == 0.25
    assert (
        rows[0]["modes"]["ape"]["match"] == complete(None, FakeRunner())[0]["modes"]["ape"]["match"]
    )
    print_report({"model": "m", "rows": rows}, ["likelihood"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "ape: 1 of 4 accepted answers do not fit the model behind their prompts" in shown
    again = FakeRunner()
    assert complete(path, again, likelihood=True) == rows
    assert again.asked == []


def test_likelihoods_are_compared_where_both_have_one(tmp_path: Path) -> None:
    rows = complete(None, TooLong(("sequential",), "0"), likelihood=True)
    against = rows[0]["modes"]["ape"]["against_sequential"]
    assert against["likelihood"]["difference"]["mean"] == -0.25
    none = complete(None, TooLong(("ape",), "0123"), likelihood=True)
    assert "likelihood" not in none[0]["modes"]["ape"]
    assert "likelihood" not in none[0]["modes"]["ape"]["against_sequential"]
    print_report({"model": "m", "rows": none}, ["likelihood", "match"])
    save_plot({"model": "m", "rows": none}, "likelihood", tmp_path / "plot.png")


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


@pytest.mark.parametrize("line", ['{"foo": 1}', "[1]", "1", '{"mode": "ape"}', "null"])
def test_line_of_something_else_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    complete(path, FakeRunner())
    count = len(path.read_text().splitlines())
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ConfigError, match=f"line {count + 1}: .*Delete the line"):
        AnswerLog(path, SETTINGS)


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda old, new: new["rows"][0].update(documents=9), "single, 9 contexts: not compared"),
        (lambda old, new: old["rows"].clear(), "ape: not compared"),
        (lambda old, new: old["rows"][0]["modes"].pop("ape"), None),
        (lambda old, new: [row["modes"].pop("ape") for row in old["rows"]], "ape: not compared"),
        (
            lambda old, new: new["rows"][1]["modes"].update(ape={"answered": 0}),
            "single, 2 contexts, ape: match was not compared",
        ),
        (
            lambda old, new: [row["modes"].update(ape={"answered": 0}) for row in new["rows"]],
            "ape: not compared",
        ),
    ],
)
def test_what_was_not_compared_is_said(
    change: Callable[[Any, Any], object], said: str | None
) -> None:
    old, new = report(), report()
    change(old, new)
    found = disagreements(old, new)
    assert any(line.startswith(said) for line in found) if said else found == []


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.update(rows=3),
        lambda report: report.update(rows=[]),
        lambda report: report.update(rows=[{"x": 1}]),
        lambda report: report.update(modes=[]),
        lambda report: report.update(modes={}),
        lambda report: report["rows"][0]["modes"].update(ape=3),
        lambda report: report["rows"][0]["modes"]["ape"].update(match=0.5),
        lambda report: report["rows"][0]["modes"]["ape"]["match"].update(low="none"),
    ],
)
def test_report_that_nothing_can_be_compared_with_is_none(change: Callable[[Any], object]) -> None:
    whole = {**report(), "modes": {"sequential": {}, "ape": {}}}
    assert is_report(whole)
    change(whole)
    assert not is_report(whole)
