"""Scores of an answer: whole match, SQuAD exact match and F1, containment, ROUGE-L."""

from __future__ import annotations

import importlib.util
import re
import string
from collections.abc import Mapping, Sequence

from ape_integrations.errors import ConfigError, MissingDependencyError

#: The metric that asks what the model expects, not what it says.
LIKELIHOOD = "likelihood"

#: What each metric is. All lie in [0, 1]; of several accepted answers the best one counts, but for
#: the likelihood, which is that of the first.
METRICS: Mapping[str, str] = {
    "match": "the whole answer, character by character",
    "exact_match": "SQuAD exact match: without case, punctuation and articles",
    "f1": "SQuAD F1 over the words of the answer",
    "contains": "an accepted answer stands in the text, without case, punctuation and articles",
    "rouge_l": "ROUGE-L F-measure",
    LIKELIHOOD: "probability of the accepted answer, geometric mean over its tokens",
}


def score_answer(text: str, answers: Sequence[str], pattern: str | None = None) -> dict[str, float]:
    """Score one answer by every metric that needs nothing but its text.

    Exact match, F1 and ROUGE-L are those of torchmetrics.

    Parameters
    ----------
    text : str
        What the model wrote.
    answers : sequence of str
        Accepted answers, at least one.
    pattern : str, optional
        Regular expression of the part that counts, in text and answers alike: its last match, of
        which the first group if it has one. A text without a match counts as empty.

    Returns
    -------
    dict of str to float
        One value in [0, 1] for each of :data:`METRICS` but the likelihood.

    Raises
    ------
    MissingDependencyError
        torchmetrics is not installed.
    """
    check_installed()
    from torchmetrics.functional.text import rouge_score, squad

    if pattern is not None:
        text, answers = _part(text, pattern), [_part(answer, pattern) for answer in answers]
    text, answers = text.strip(), [answer.strip() for answer in answers]
    squad_scores = squad(
        [{"prediction_text": text, "id": "0"}],
        [{"answers": {"text": list(answers), "answer_start": [0] * len(answers)}, "id": "0"}],
    )
    rouge = rouge_score(text, list(answers), accumulate="best", rouge_keys="rougeL")
    return {
        "match": float(text in answers),
        "exact_match": float(squad_scores["exact_match"]) / 100,
        "f1": float(squad_scores["f1"]) / 100,
        "contains": float(_contains(text, answers)),
        "rouge_l": float(rouge["rougeL_fmeasure"]),
    }


def check_installed() -> None:
    """Refuse to start what cannot be scored in the end.

    Raises
    ------
    MissingDependencyError
        torchmetrics is not installed.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise MissingDependencyError(
            "Scores need torchmetrics: pip install 'ape-integrations[eval]'."
        )


def check_metrics(names: Sequence[str]) -> None:
    """Refuse an unknown name of a metric.

    Raises
    ------
    ConfigError
        Names the metrics there are.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ConfigError(f"Unknown metric {unknown[0]!r}. Choose from: {', '.join(METRICS)}.")


def check_pattern(pattern: str | None) -> None:
    """Refuse what is no regular expression.

    Raises
    ------
    ConfigError
        Says where it goes wrong.
    """
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}.") from error


def _contains(text: str, answers: Sequence[str]) -> bool:
    words = f" {_normalised(text)} "
    return any(f" {wanted} " in words for wanted in map(_normalised, answers) if wanted)


def _normalised(text: str) -> str:
    """Normalise as SQuAD's metrics do."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _part(text: str, pattern: str) -> str:
    found = list(re.finditer(pattern, text))
    if not found:
        return ""
    last = found[-1]
    return (last[1] if last.re.groups else last[0]) or ""
