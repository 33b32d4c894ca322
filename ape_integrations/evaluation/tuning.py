"""T and S by the score of a task: a small grid, cross-validated, against the defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ape_integrations.core.config import APEConfig
from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    mean_estimate,
)

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
SCALES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
MIN_CASES = 10
GAIN_LEVEL = 0.99  # of the interval that must lie above zero

Setting = tuple[float, float]
#: Scores of all cases, in a fixed order, with some T and S.
Scores = Callable[[float, float], Sequence[float]]


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Parameters
    ----------
    setting : (float, float)
        T and S to use.
    best : (float, float)
        T and S with the highest score on the whole sample.
    recommended : bool
        Whether ``best`` is recommended. If not, ``setting`` is the default.
    gain : Estimate
        Mean gain over the defaults on cases that the choice of T and S had not seen, with its
        99 % paired bootstrap interval.
    default_score : Estimate
        Score with the default T and S.
    grid : dict
        Mean score of every T and S that was tried.
    cases : int
        Size of the sample.
    """

    setting: Setting
    best: Setting
    recommended: bool
    gain: Estimate
    default_score: Estimate
    grid: dict[Setting, Estimate]
    cases: int


def tune(
    scores: Scores,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    scales: Sequence[float] = SCALES,
    folds: int = 5,
    seed: int = 0,
) -> Tuning:
    """Choose T with S = 1, then S with that T, and measure what the choice gains.

    The gain is estimated by cross-validation: the choice is made without a fold and scored on it,
    against the defaults on the same cases. The settings chosen on the whole sample are recommended
    only if the 99 % bootstrap interval of that gain lies above zero: folds learn from one another's
    cases, so that the spread is a quarter larger than the bootstrap sees; of 100 samples of pure
    noise one or two get past 99 %, five or six past 95 %. The score of the task decides, because
    the divergence from sequential encoding is reported not to follow it.

    Parameters
    ----------
    scores : callable
        ``(T, S) -> scores``, one per case in a fixed order, higher is better. Called once for each
        setting.
    temperatures, scales : sequence of float
        The grid.
    folds : int
        Parts of the cross-validation.
    seed : int
        Of the folds and the bootstrap.

    Returns
    -------
    Tuning

    Raises
    ------
    ConfigError
        See :func:`check_grid`.
    """
    default = (APEConfig().attention_temperature, APEConfig().scaling_factor)
    table = _Table(scores)
    base = table(*default)
    check_grid(len(base), folds, temperatures, scales)
    random = np.random.default_rng(seed)
    order = random.permutation(len(base))
    gains = np.zeros(len(base))
    for held_out in np.array_split(order, folds):
        seen = np.setdiff1d(order, held_out)
        chosen = _choose(table, seen, default, temperatures, scales)
        gains[held_out] = table(*chosen)[held_out] - base[held_out]
    best = _choose(table, order, default, temperatures, scales)
    gain = bootstrap_mean(gains.tolist(), level=GAIN_LEVEL, draws=5000, seed=seed)
    recommended = best != default and gain.low > 0
    return Tuning(
        best if recommended else default,
        best,
        recommended,
        gain,
        mean_estimate(base),
        {setting: mean_estimate(values) for setting, values in sorted(table.known.items())},
        len(base),
    )


class _Table:
    """Scores by setting, each computed once."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores
        self.known: dict[Setting, Any] = {}

    def __call__(self, temperature: float, scale: float) -> Any:
        setting = (temperature, scale)
        if setting not in self.known:
            self.known[setting] = np.asarray(self._scores(*setting), dtype=float)
        return self.known[setting]


def _choose(
    table: _Table,
    cases: Any,
    default: Setting,
    temperatures: Sequence[float],
    scales: Sequence[float],
) -> Setting:
    """Return the best T with S = 1, then the best S with it; the default where none is better."""

    def best(settings: Sequence[Setting]) -> Setting:
        def merit(setting: Setting) -> tuple[float, float]:
            distance = abs(setting[0] - default[0]) + abs(setting[1] - default[1])
            return round(float(table(*setting)[cases].mean()), 12), -distance

        return max(settings, key=merit)

    temperature, _ = best([(t, 1.0) for t in temperatures])
    return best([(temperature, 1.0), *((temperature, s) for s in scales), default])


def check_grid(
    cases: int, folds: int, temperatures: Sequence[float], scales: Sequence[float]
) -> None:
    """Refuse what cannot be tuned.

    Parameters
    ----------
    cases : int
        Size of the sample.
    folds, temperatures, scales
        See :func:`tune`.

    Raises
    ------
    ConfigError
        Fewer than ten cases or than two folds, more folds than cases, or a grid that is empty or
        holds a T or S out of range.
    """
    if cases < MIN_CASES:
        raise ConfigError(
            f"Tuning needs at least {MIN_CASES} cases, better 100 and more; there are {cases}."
        )
    if not 2 <= folds <= cases:
        raise ConfigError(f"There must be between 2 and {cases} folds, not {folds}.")
    if not temperatures or not scales:
        raise ConfigError("The grid needs at least one T and one S.")
    for temperature in temperatures:
        replace(APEConfig(), attention_temperature=temperature)  # refuses what is out of range
    for scale in scales:
        replace(APEConfig(), scaling_factor=scale)


def as_json(tuning: Tuning, metric: str) -> dict[str, Any]:
    """Return what was measured, for files and programs."""
    return {
        "metric": metric,
        "cases": tuning.cases,
        "attention_temperature": tuning.setting[0],
        "scaling_factor": tuning.setting[1],
        "recommended": tuning.recommended,
        "best": {"attention_temperature": tuning.best[0], "scaling_factor": tuning.best[1]},
        "gain": tuning.gain.as_json(),
        "default_score": tuning.default_score.as_json(),
        "grid": [
            {"attention_temperature": t, "scaling_factor": s, **estimate.as_json()}
            for (t, s), estimate in tuning.grid.items()
        ],
    }
