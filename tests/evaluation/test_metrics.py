"""Scores are those of SQuAD and ROUGE, and the demo's whole match."""

from __future__ import annotations

import importlib.util

import pytest

from ape_integrations.errors import ConfigError, MissingDependencyError
from ape_integrations.evaluation.metrics import (
    LIKELIHOOD,
    METRICS,
    check_metrics,
    check_pattern,
    score_answer,
)


def test_perfect_answer_has_every_score() -> None:
    scores = score_answer("Ada lives in Porto.", ["Ada lives in Porto."])
    assert scores == dict.fromkeys(METRICS.keys() - {LIKELIHOOD}, 1)


def test_exact_match_ignores_case_articles_and_punctuation() -> None:
    scores = score_answer("The  eiffel tower!", ["Eiffel Tower"])
    assert scores["exact_match"] == 1
    assert scores["match"] == 0


def test_f1_counts_common_words() -> None:
    scores = score_answer("in Porto", ["Porto Alegre city"])
    # Precision 1/2, recall 1/3.
    assert scores["f1"] == pytest.approx(0.4)
    assert scores["exact_match"] == 0


def test_rouge_l_counts_the_longest_common_subsequence() -> None:
    scores = score_answer("police killed the gunman", ["police kill the gunman"])
    assert scores["rouge_l"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("text", "answers", "value"),
    [
        ("It is the Eiffel Tower, in Paris.", ["eiffel tower"], 1),
        ("It was bought in 1967.", ["late 1967", "1967"], 1),
        ("She writes articles.", ["art"], 0),
        ("A city.", ["The", ""], 0),
    ],
)
def test_contains_looks_for_whole_words(text: str, answers: list[str], value: int) -> None:
    assert score_answer(text, answers)["contains"] == value


def test_best_of_several_answers_counts() -> None:
    scores = score_answer("New York City", ["NYC", "New York City", "Gotham"])
    assert set(scores.values()) == {1.0}


def test_empty_answer_scores_nothing() -> None:
    assert set(score_answer("", ["Porto"]).values()) == {0.0}


def test_pattern_scores_the_last_match_of_text_and_answers() -> None:
    pattern = r"####\s*(-?[\d,]+)"
    text = "First #### 3 apples, then 4 more. #### 7\nDone."
    assert score_answer(text, ["3 + 4 = 7 #### 7"], pattern)["exact_match"] == 1
    assert score_answer("It is 7.", ["#### 7"], pattern)["exact_match"] == 0


def test_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bleu.*rouge_l"):
        check_metrics(["f1", "bleu"])


def test_wrong_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match="regular expression"):
        check_pattern("(")


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"ape-integrations\[eval\]"):
        score_answer("a", ["a"])
