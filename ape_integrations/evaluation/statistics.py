"""Means with 95 % confidence intervals, single and paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z = 1.959963984540054  # 97.5th percentile of the standard normal distribution


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval, of 95 % where nothing else is said.

    Parameters
    ----------
    mean : float
        The value itself.
    low, high : float
        Ends of the interval.
    """

    mean: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """Return the three numbers, rounded to what is significant."""
        return {
            "mean": round(self.mean, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
        }


def mean_estimate(scores: Sequence[float]) -> Estimate:
    """Return the mean of scores in [0, 1].

    Parameters
    ----------
    scores : sequence of float
        One per case, at least one.

    Returns
    -------
    Estimate
        Wilson's interval where all scores are 0 or 1 (Wilson, 1927), Student's otherwise.
    """
    values = np.asarray(scores, dtype=float)
    mean = float(values.mean())
    if _binary(values):
        n = len(values)
        centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        spread = math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n)) * Z / (1 + Z * Z / n)
        return Estimate(mean, max(0.0, centre - spread), min(1.0, centre + spread))
    spread = _student_spread(values)
    return Estimate(mean, max(0.0, mean - spread), min(1.0, mean + spread))


def paired_difference(scores: Sequence[float], base: Sequence[float]) -> Estimate:
    """Return the mean difference of two lists of scores of the same cases.

    Parameters
    ----------
    scores, base : sequence of float
        Scores in [0, 1] of the same cases in the same order.

    Returns
    -------
    Estimate
        ``scores - base``: Bonett and Price's interval (2012) where all scores are 0 or 1, which has
        a width even where no case differs; Student's otherwise.
    """
    first, second = np.asarray(scores, dtype=float), np.asarray(base, dtype=float)
    differences = first - second
    mean = float(differences.mean())
    if _binary(first) and _binary(second):
        n = len(differences)
        gained = (float((differences > 0).sum()) + 1) / (n + 2)
        lost = (float((differences < 0).sum()) + 1) / (n + 2)
        spread = Z * math.sqrt((gained + lost - (gained - lost) ** 2) / (n + 2))
        centre = gained - lost
        return Estimate(mean, max(-1.0, centre - spread), min(1.0, centre + spread))
    spread = _student_spread(differences)
    return Estimate(mean, max(-1.0, mean - spread), min(1.0, mean + spread))


def share_kept(difference: Estimate, base_mean: float) -> Estimate | None:
    """Return which share of the base's performance is kept on these cases.

    Parameters
    ----------
    difference : Estimate
        From :func:`paired_difference`.
    base_mean : float
        Mean of the base, taken as it was measured.

    Returns
    -------
    Estimate or None
        ``1 + difference / base_mean``; None where the base is 0.
    """
    if base_mean <= 0:
        return None
    mean, low, high = (
        1 + value / base_mean for value in (difference.mean, difference.low, difference.high)
    )
    return Estimate(mean, max(0.0, low), high)


def bootstrap_mean(
    values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Estimate:
    """Return the mean with its percentile bootstrap interval.

    Parameters
    ----------
    values : sequence of float
        One per case, for example paired differences.
    level : float
        Confidence of the interval.
    draws : int
        Resamples.
    seed : int
        The same seed gives the same interval.
    """
    data = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    means = data[random.integers(0, len(data), (draws, len(data)))].mean(axis=1)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return Estimate(float(data.mean()), float(low), float(high))


def _binary(values: Any) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _student_spread(values: Any) -> float:
    n = len(values)
    if n < 2:
        return 1.0
    if values.std() == 0:  # what was never seen may still be as frequent as this
        return float(1 - 0.05 ** (1 / n))
    return _student_quantile(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)


def _student_quantile(freedom: int) -> float:
    """97.5th percentile of Student's t (Abramowitz and Stegun, 26.7.5), to 4 % at 2 degrees."""
    z = Z
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
