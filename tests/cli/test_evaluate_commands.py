"""``eval`` and ``tune``, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ape_integrations.cli import app
from ape_integrations.core import tuned
from ape_integrations.core.config import APEConfig
from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.metrics import LIKELIHOOD, METRICS
from tests.models import byte_tokenizer, tiny_model

DATA = Path(__file__).parent.parent / "data"
QUESTIONS, FEW_SHOT = str(DATA / "questions.jsonl"), str(DATA / "few_shot.jsonl")


def _run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _report(*arguments: str) -> Any:
    return json.loads(_run("eval", "--json", *arguments).stdout)


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny random Llama whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_demo_scores_every_mode_on_the_same_cases() -> None:
    report = _report("--demo", "--samples", "2", "--kind", "follow-up", "--kind", "few-shot")
    assert report["model"] == "tiny-reader"
    assert [(row["task"], row["documents"]) for row in report["rows"]] == [
        *(("follow-up", n) for n in (4, 8)),
        *(("few-shot", n) for n in (4, 8, 16)),
    ]
    for row in report["rows"]:
        assert list(row["modes"]) == ["sequential", "parallel", "prefix", "ape"]
        for label, figures in row["modes"].items():
            assert figures["answered"] == row["cases"] == 2
            assert METRICS.keys() & figures == METRICS.keys() - {LIKELIHOOD}
            assert ("against_sequential" in figures) == (label != "sequential")


def test_likelihood_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    arguments = ("--demo", "--samples", "2", "--kind", "single", "--contexts", "8", "--mode", "ape")
    report = _report(*arguments, "--metric", LIKELIHOOD)
    likelihood = report["rows"][0]["modes"]["ape"][LIKELIHOOD]["mean"]
    assert 0 < likelihood <= 1
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps(report))
    checked = _report("--check", str(saved))
    assert checked["rows"][0]["modes"]["ape"][LIKELIHOOD]["mean"] == pytest.approx(likelihood)


def test_any_model_answers_questions_and_few_shot_records(random_llama: str) -> None:
    report = _report(
        *("--model", random_llama, "--data", QUESTIONS, "--data", FEW_SHOT),
        *("--mode", "sequential", "--mode", "ape:T=0.8", "--max-new-tokens", "4"),
    )
    assert [(row["task"], row["cases"]) for row in report["rows"]] == [
        ("questions", 3),
        ("few_shot", 2),
    ]
    assert report["modes"]["ape:T=0.8"]["config"]["attention_temperature"] == 0.8


def test_prompt_and_stop_strings_are_taken_as_given(random_llama: str, tmp_path: Path) -> None:
    template, answers = tmp_path / "template.txt", tmp_path / "answers.jsonl"
    template.write_text("{contexts}\n{question}\n")
    for options, stop in ((("--completion",), "\n"), (("--stop", "\\n\\n"), "\n\n")):
        _run(
            *("eval", "--data", QUESTIONS, "--model", random_llama, "--template", str(template)),
            *("--mode", "sequential", "--answers", str(answers), "--max-new-tokens", "2"),
            *("--samples", "1", *options),
        )
        settings, _, answer = map(json.loads, answers.read_text().splitlines())
        assert settings["settings"]["stop"] == [stop]
        record = json.loads(Path(QUESTIONS).read_text().splitlines()[0])
        written = "\n\n".join(record["contexts"]) + "\n" + record["question"]
        if "--completion" in options:  # one token a byte; the file's last line end is none of it
            assert answer["tokens"] == len(written)
        answers.unlink()


def test_report_is_checked_by_running_it_again(tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    arguments = ("--demo", "--samples", "3", "--kind", "few-shot", "--mode", "prefix")
    report = _report(*arguments)
    saved.write_text(json.dumps(report))
    assert _run("eval", "--check", str(saved)).exit_code == 0
    for row in report["rows"]:
        row["modes"]["prefix"]["match"] = {"mean": 2.0, "low": 1.9, "high": 2.1}
    saved.write_text(json.dumps(report))
    result = _run("eval", "--check", str(saved))
    assert result.exit_code == 1
    assert "few-shot, 4 contexts, prefix: match is" in result.stderr


def test_bad_line_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"question": "Who?", "contexts": ["a"], "answers": "b"}\n{"question": 1}\n')
    with pytest.raises(ConfigError, match=r"bad.jsonl, line 2"):
        _run("eval", "--data", str(data), "--model", "no/such-model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--demo"),
        (["--demo", "--data", QUESTIONS], "One of the two"),
        (["--demo", "--mode", "faster"], "Unknown mode"),
        (["--demo", "--kind", "riddle"], "Unknown kind"),
        (["--demo", "--metric", "bleu"], "Unknown metric"),
        (["--demo", "--contexts", "3"], "No row has 3 contexts: single: 1, 8, 16"),
        (["--demo", "--dtype", "int3"], "Unknown dtype"),
        (["--data", QUESTIONS, "--kind", "single"], "--kind"),
        (["--data", QUESTIONS, "--answer-pattern", "("], "regular expression"),
        (["--data", QUESTIONS, "--template", "nowhere.txt"], "Cannot read nowhere.txt"),
        (["--data", QUESTIONS, "--model", "/nowhere"], "Cannot load '/nowhere'"),
        (["--check", QUESTIONS], "no report"),
    ],
)
def test_eval_refuses_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run("eval", *arguments)


def test_tuned_settings_are_saved_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "tuned_directory", lambda: tmp_path)
    arguments = ("--demo", "--samples", "6", "--kind", "single", "--temperature", "0.9,1")
    result = json.loads(_run("tune", "--json", *arguments, "--scale", "1", "--folds", "2").stdout)
    assert result["cases"] == 12
    assert [(row["attention_temperature"], row["scaling_factor"]) for row in result["grid"]] == [
        (0.9, 0.9),
        (0.9, 1.0),
        (1.0, 1.0),
    ]
    assert Path(result["saved"]).parent == tmp_path
    config = APEConfig.from_tuned("tiny-reader")
    assert config.attention_temperature == result["attention_temperature"]
    report = _report("--demo", "--samples", "1", "--kind", "follow-up", "--mode", "tuned")
    assert report["modes"]["tuned"]["config"]["scaling_factor"] == result["scaling_factor"]


def test_tune_can_go_by_the_likelihood(tmp_path: Path) -> None:
    arguments = ("--demo", "--samples", "5", "--kind", "single", "--temperature", "0.5,1")
    out = tmp_path / "tuned.json"
    result = json.loads(
        _run(
            *("tune", "--json", *arguments, "--scale", "1", "--metric", LIKELIHOOD),
            *("--folds", "2", "--out", str(out)),
        ).stdout
    )
    assert result["metric"] == LIKELIHOOD
    assert len({row["mean"] for row in result["grid"]}) == 3
    assert all(0 < row["mean"] <= 1 for row in result["grid"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--demo"),
        (["--demo", "--temperature", "warm"], "no list of numbers"),
        (["--demo", "--metric", "bleu"], "Unknown metric"),
        (["--data", QUESTIONS], "at least 10 cases"),
    ],
)
def test_tune_refuses_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run("tune", *arguments)
