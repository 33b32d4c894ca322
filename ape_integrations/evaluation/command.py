"""What the commands ``eval`` and ``tune`` do, without their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ape_integrations.core import tuned
from ape_integrations.core.fingerprint import model_fingerprint
from ape_integrations.core.tuned import TunedSettings, known_as, save_tuned
from ape_integrations.errors import ConfigError, ContextWindowError
from ape_integrations.evaluation.answers import AnswerLog
from ape_integrations.evaluation.metrics import LIKELIHOOD, score_answer
from ape_integrations.evaluation.modes import Mode, Runner, parse_mode
from ape_integrations.evaluation.prompts import Case
from ape_integrations.evaluation.runner import run, summarise, versions
from ape_integrations.evaluation.setup import TUNING_GRID, Session, Setup
from ape_integrations.evaluation.tuning import SCALES, TEMPERATURES, Scores, as_json, check_grid
from ape_integrations.evaluation.tuning import tune as choose
from ape_integrations.outputs import check_file

DEFAULT_MODES = ("sequential", "parallel", "prefix", "ape")


def report(
    setup: Setup,
    labels: Sequence[str],
    answers: Path | None = None,
    *,
    likelihood: bool = False,
) -> dict[str, Any]:
    """Evaluate a model in several modes.

    Parameters
    ----------
    setup : Setup
        Model, cases, and how to ask.
    labels : sequence of str
        Modes as on the command line; see :func:`~ape_integrations.evaluation.modes.parse_mode`.
    answers : Path, optional
        File of answers to go on from.
    likelihood : bool
        Whether to ask for the likelihood of the accepted answers too.

    Returns
    -------
    dict
        ``model``, ``setup``, ``environment``, ``modes`` (by label, what it means and sets) and
        ``rows`` (see :func:`~ape_integrations.evaluation.runner.summarise`).

    Raises
    ------
    ConfigError
        A mode, file or setting is wrong.
    """
    modes = [parse_mode(label) for label in dict.fromkeys(labels)]
    session = Session(setup)
    log = AnswerLog(answers, session.settings())
    try:
        rows = session.rows()
        run(session.runner, rows, modes, log, likelihood=likelihood)
    finally:
        log.close()
    return {
        "model": setup.model_name,
        "setup": setup.as_json(),
        "environment": {**session.settings(), **versions()},
        "modes": {mode.label: mode.as_json(session.generator.model) for mode in modes},
        "rows": summarise(rows, modes, log, setup.pattern),
    }


def tune_model(
    setup: Setup,
    metric: str,
    *,
    temperatures: Sequence[float],
    scales: Sequence[float],
    folds: int = 5,
    out: Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """Choose T and S for a model and save them for ``APEConfig.from_tuned``.

    Parameters
    ----------
    setup : Setup
        Model and labelled sample.
    metric : str
        What to raise.
    temperatures, scales, folds
        See :func:`~ape_integrations.evaluation.tuning.tune`.
    out : Path, optional
        File for the result; by default one in the user's data directory.

    Returns
    -------
    report : dict
        What was measured.
    path : Path
        Where it was saved.

    Raises
    ------
    ConfigError
        A setting is wrong, there are too few cases, or the result could not be saved.
    """
    _check_out(out)
    session = Session(setup, TUNING_GRID)
    cases = [case for row in session.rows() for case in row]
    check_grid(len(cases), folds, temperatures, scales)
    expected = len(temperatures) + len(scales)
    scores = model_scores(session.runner, cases, metric, setup.pattern, expected=expected)
    tuning = choose(scores, temperatures=temperatures, scales=scales, folds=folds, seed=setup.seed)
    result = {"model": setup.model_name, **as_json(tuning, metric)}
    settings = TunedSettings(
        model=known_as(setup.model_name),
        fingerprint=model_fingerprint(session.generator.model),
        attention_temperature=tuning.setting[0],
        scaling_factor=tuning.setting[1],
        recommended=tuning.recommended,
        report={"setup": setup.as_json(), **result},
    )
    return result, save_tuned(settings, out)


def _check_out(out: Path | None) -> None:
    """Refuse to start what cannot be saved in the end."""
    path = out or tuned.tuned_directory() / "settings.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot make the folder {path.parent}: {error.strerror}. Choose another place with "
            "--out."
        ) from error
    check_file(path, "--out")


def model_scores(
    runner: Runner,
    cases: Sequence[Case],
    metric: str,
    pattern: str | None = None,
    *,
    expected: int = len(TEMPERATURES) + len(SCALES),
) -> Scores:
    """Return the scores of a model as a function of T and S, with a progress bar.

    Parameters
    ----------
    runner : Runner
        Answers.
    cases : sequence of Case
        The labelled sample.
    metric : str
        One of :data:`~ape_integrations.evaluation.metrics.METRICS`.
    pattern : str, optional
        See :func:`~ape_integrations.evaluation.metrics.score_answer`.
    expected : int
        Settings that will be tried, as far as is known.

    Raises
    ------
    ConfigError
        A prompt does not fit the model, when the scores are computed.
    """
    total = expected * len(cases)
    progress = tqdm(total=total, desc="Tuning", unit="answer", disable=None)

    def scores(temperature: float, scale: float) -> list[float]:
        changes = {"attention_temperature": temperature, "scaling_factor": scale}
        mode = Mode(f"T={temperature:g},S={scale:g}", "ape", changes)
        found = []
        for case in cases:
            found.append(_score(runner, mode, case, metric, pattern))
            progress.update()
        progress.total = max(total, progress.n)  # folds may choose another T each
        return found

    return scores


def _score(runner: Runner, mode: Mode, case: Case, metric: str, pattern: str | None) -> float:
    if metric == LIKELIHOOD:
        try:
            return runner.likelihood(mode, case)
        except ContextWindowError as error:
            raise ConfigError(
                "A prompt and its accepted answer do not fit the model's positions: tune on "
                "shorter ones."
            ) from error
    text = runner.answer(mode, case).text
    if text is None:
        raise ConfigError("A prompt does not fit the model's positions: tune on shorter ones.")
    return score_answer(text, case.answers, pattern)[metric]
