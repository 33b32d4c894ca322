"""Tuning finds a best T and S where there is one, and keeps the defaults where chance rules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ape_integrations.core.config import APEConfig
from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.tuning import Tuning, tune

DEFAULT = (APEConfig().attention_temperature, APEConfig().scaling_factor)


def model(
    merit: Callable[[float, float], float], cases: int, seed: int
) -> Callable[[float, float], list[float]]:
    """Answer right with probability ``merit(T, S)``; hard cases are hard for every setting."""
    difficulty = np.random.default_rng(seed).random(cases)

    def scores(temperature: float, scale: float) -> list[float]:
        own = np.random.default_rng([seed, int(temperature * 100), int(scale * 100)])
        noisy = 0.7 * difficulty + 0.3 * own.random(cases)
        # Uniform again, so that the share of right answers is the merit.
        ranks = noisy.argsort().argsort() / cases
        return (ranks < merit(temperature, scale)).astype(float).tolist()

    return scores


@pytest.mark.parametrize("best", [0.6, 0.7, 1.1])
@pytest.mark.parametrize("seed", range(3))
def test_known_best_temperature_is_found(best: float, seed: int) -> None:
    tuning = tune(model(lambda t, s: 0.85 - 0.6 * abs(t - best), 400, seed), seed=seed)
    assert tuning.best[0] == best
    assert tuning.recommended
    assert tuning.setting == tuning.best
    assert tuning.gain.low > 0


def test_known_best_scale_is_found_at_the_best_temperature() -> None:
    tuning = tune(model(lambda t, s: 0.9 - 0.4 * abs(t - 0.7) - 0.4 * abs(s - 1.2), 300, 0))
    assert tuning.setting == (0.7, 1.2)
    assert (0.8, 1.1) not in tuning.grid


def on_noise(seed: int, cases: int = 100) -> Tuning:
    random = np.random.default_rng(seed)
    return tune(lambda t, s: (random.random(cases) < 0.7).astype(float).tolist(), seed=seed)


def test_noise_keeps_the_defaults() -> None:
    found = [on_noise(seed) for seed in range(150)]
    wrong = [tuning for tuning in found if tuning.recommended]
    assert len(wrong) / len(found) <= 0.05
    assert all(t.setting == DEFAULT for t in found if not t.recommended)
    # The best of a grid on its own sample always looks better; that is what must not be believed.
    flattering = [t.grid[t.best].mean - t.default_score.mean for t in found]
    assert np.mean(flattering) > 0.06
    assert abs(np.mean([t.gain.mean for t in found])) < 0.02


def test_equal_scores_keep_the_defaults() -> None:
    tuning = tune(lambda t, s: [1.0, 0.0] * 20)
    assert not tuning.recommended
    assert tuning.best == tuning.setting == DEFAULT


def test_gain_comes_from_cases_that_the_choice_has_not_seen() -> None:
    """One setting per half of the cases is right: a choice never helps the other half."""
    half = np.arange(40) % 2 == 0

    def scores(temperature: float, scale: float) -> list[float]:
        if (temperature, scale) == DEFAULT:
            return [0.5] * 40
        return np.where(half, temperature == 0.7, temperature == 1.1).astype(float).tolist()

    tuning = tune(scores, temperatures=(0.7, 1.1), scales=(1.0,))
    assert not tuning.recommended


def test_every_setting_is_scored_once() -> None:
    seen: list[tuple[float, float]] = []

    def scores(temperature: float, scale: float) -> list[float]:
        seen.append((temperature, scale))
        return [float(temperature == 1.0)] * 20

    tune(scores)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("cases", "options", "problem"),
    [
        (9, {}, "at least 10 cases"),
        (20, {"folds": 1}, "folds"),
        (20, {"folds": 21}, "folds"),
        (20, {"scales": ()}, "at least one T and one S"),
    ],
)
def test_bad_arguments_are_refused(cases: int, options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tune(lambda t, s: [1.0] * cases, **options)  # type: ignore[arg-type]
