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
from ape_integrations.evaluation.modes import Runner
from ape_integrations.evaluation.setup import Setup
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


def _few_shot_report(path: Path) -> dict[str, Any]:
    """Save a report of one row and mode; return it."""
    arguments = ("--demo", "--samples", "2", "--kind", "few-shot", "--contexts", "4")
    report: dict[str, Any] = _report(*arguments, "--mode", "prefix")
    path.write_text(json.dumps(report))
    return report


def test_check_fails_where_nothing_can_be_compared(tmp_path: Path) -> None:
    data, saved = tmp_path / "q.jsonl", tmp_path / "report.json"
    value = {"question": "Where?", "contexts": ["Argent is in Geneva."], "answers": ["Geneva"]}
    data.write_text(json.dumps(value))
    arguments = ("--data", str(data), "--mode", "ape", "--max-new-tokens", "2")
    saved.write_text(json.dumps(_report(*arguments)))
    assert _run("eval", "--check", str(saved)).exit_code == 0
    data.write_text(json.dumps({**value, "question": "Where? " + "word " * 9_000}))
    unanswered = _run("eval", "--check", str(saved))
    assert unanswered.exit_code == 1
    assert "ape: not compared, there is no mean of it in both reports" in unanswered.stderr
    data.write_text(json.dumps({**value, "contexts": ["Argent.", "Geneva."]}))
    other = _run("eval", "--check", str(saved))
    assert other.exit_code == 1
    assert "q, 2.0 contexts: not compared" in other.stderr


def test_check_refuses_what_the_report_decides(tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    _few_shot_report(saved)
    for option, value in (
        ("--model", "/other"),
        ("--samples", "3"),
        ("--data", "nofile"),
        ("--max-new-tokens", "48"),
        ("--dtype", "auto"),
    ):
        with pytest.raises(ConfigError, match=f"{option} has no place beside --check"):
            _run("eval", "--check", str(saved), option, value)
    with pytest.raises(ConfigError, match="Mode 'ape' is not in the report"):
        _run("eval", "--check", str(saved), "--mode", "ape")


def test_check_refuses_a_damaged_report(tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    report = _few_shot_report(saved)
    for changed, message in (
        ({"rows": []}, "with a mean to compare"),
        ({"modes": []}, "with a mean to compare"),
        ({"setup": 1}, "its setup is not known"),
        ({"setup": {**report["setup"], "seed": "x"}}, "damaged: seed cannot be 'x'"),
        ({"setup": {**report["setup"], "samples": [1]}}, r"damaged: samples cannot be \[1\]"),
        ({"setup": {**report["setup"], "kinds": [1]}}, r"damaged: kinds cannot be \[1\]"),
        ({"setup": {**report["setup"], "max_new_tokens": 0}}, "at least 1"),
    ):
        saved.write_text(json.dumps({**report, **changed}))
        with pytest.raises(ConfigError, match=message):
            _run("eval", "--check", str(saved))
    with pytest.raises(ConfigError, match=r"Cannot read .*nowhere"):
        _run("eval", "--check", str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("no/folder/plot.png", "Cannot write into no/folder: No such file"),
        ("plot.xyz", "must end in one of .png"),
        ("plot", "must end in one of .png"),
    ],
)
def test_plot_that_cannot_be_saved_is_refused_first(plot: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run("eval", "--demo", "--model", "/nowhere", "--plot", plot)


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
        (["--demo", "--temperature", ","], "no list of numbers"),
        (["--demo", "--metric", "bleu"], "Unknown metric"),
        (["--data", QUESTIONS], "at least 10 cases"),
    ],
)
def test_tune_refuses_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run("tune", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folds", "50"], "between 2 and 12 folds, not 50"),
        (["--temperature", "nan"], "attention_temperature must lie in"),
        (["--scale", "9"], "scaling_factor must"),
        (["--out", "folder"], "folder is a folder. Name a file with --out"),
        (["--out", "file/x"], "Cannot make the folder file"),
    ],
)
def test_tune_refuses_before_it_scores(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    monkeypatch.setattr(Runner, "answer", lambda *_: pytest.fail("It scores already."))
    out = [] if "--out" in arguments else ["--out", "tuned.json"]
    with pytest.raises(ConfigError, match=message):
        _run("tune", "--demo", "--samples", "6", "--kind", "single", *arguments, *out)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_negative_seed_is_refused() -> None:
    assert _run("tune", "--demo", "--seed", "-1").exit_code == 2
    with pytest.raises(ConfigError, match="seed must not be negative"):
        Setup(seed=-1)
