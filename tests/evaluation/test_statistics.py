"""Intervals hold what they promise: about 95 of 100 contain the true value."""

from __future__ import annotations

import numpy as np
import pytest

from ape_integrations.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    mean_estimate,
    paired_difference,
    share_kept,
)

TRIALS = 1000


def coverage(found: list[Estimate], truth: float) -> float:
    return sum(e.low <= truth <= e.high for e in found) / len(found)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_interval_of_a_share_covers_it(share: float) -> None:
    random = np.random.default_rng(1)
    found = [mean_estimate((random.random(60) < share).astype(float)) for _ in range(TRIALS)]
    assert 0.91 <= coverage(found, share) <= 0.99


@pytest.mark.parametrize("cases", [5, 40])
def test_interval_of_a_graded_score_covers_its_mean(cases: int) -> None:
    random = np.random.default_rng(2)
    found = [mean_estimate(random.uniform(0, 0.8, cases)) for _ in range(TRIALS)]
    assert 0.92 <= coverage(found, 0.4) <= 0.98


def test_paired_interval_covers_the_difference() -> None:
    random = np.random.default_rng(3)
    found = []
    for _ in range(TRIALS):
        hard = random.random(80)
        found.append(
            paired_difference((hard < 0.8).astype(float), (hard < 0.85).astype(float).round())
        )
    assert coverage(found, -0.05) >= 0.94


def test_paired_interval_is_narrower_than_two_separate_ones() -> None:
    base = np.array([1.0] * 70 + [0.0] * 30)
    other = base.copy()
    other[:4] = 0
    paired = paired_difference(other, base)
    first, second = mean_estimate(other), mean_estimate(base)
    assert paired.mean == pytest.approx(-0.04)
    assert paired.high - paired.low < (first.high - first.low + second.high - second.low) / 2


def test_equal_scores_still_leave_doubt() -> None:
    scores = [1.0] * 50
    paired = paired_difference(scores, scores)
    assert paired.mean == 0
    assert paired.low < -0.02 < 0.02 < paired.high
    assert mean_estimate(scores).low < 0.95
    graded = paired_difference([0.4] * 50, [0.4] * 50)
    assert graded.low < -0.02 < 0.02 < graded.high


def test_one_case_says_nothing() -> None:
    estimate = mean_estimate([0.5])
    assert (estimate.low, estimate.high) == (0, 1)


def test_share_kept_is_relative_to_the_base() -> None:
    kept = share_kept(Estimate(-0.08, -0.16, 0.0), 0.8)
    assert kept is not None
    assert (kept.mean, kept.low, kept.high) == pytest.approx((0.9, 0.8, 1.0))
    assert share_kept(Estimate(0.1, 0.0, 0.2), 0.0) is None


def test_bootstrap_interval_covers_the_mean_and_repeats() -> None:
    random = np.random.default_rng(4)
    found = [
        bootstrap_mean(random.choice([-1, 0, 0, 1], 80).tolist(), draws=400) for _ in range(300)
    ]
    assert 0.9 <= coverage(found, 0.0) <= 0.98
    assert bootstrap_mean([0.0, 1.0, 1.0], seed=5) == bootstrap_mean([0.0, 1.0, 1.0], seed=5)
