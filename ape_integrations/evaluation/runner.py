"""Every case in every mode, scored and summarised."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from ape_integrations.core.fingerprint import model_fingerprint
from ape_integrations.errors import ContextWindowError
from ape_integrations.evaluation.answers import AnswerLog
from ape_integrations.evaluation.metrics import LIKELIHOOD, METRICS, score_answer
from ape_integrations.evaluation.modes import Answer, Mode, Runner
from ape_integrations.evaluation.prompts import Case
from ape_integrations.evaluation.statistics import (
    mean_estimate,
    paired_difference,
    share_kept,
)

BASE = "sequential"

Rows = Sequence[Sequence[Case]]


def run(
    runner: Runner,
    rows: Rows,
    modes: Sequence[Mode],
    log: AnswerLog,
    *,
    likelihood: bool = False,
) -> None:
    """Answer what is not answered yet, case by case and each case in all modes.

    Parameters
    ----------
    runner : Runner
        Answers.
    rows : sequence of sequences of Case
        Cases, row by row.
    modes : sequence of Mode
        One after the other for each case, so that whatever slows the machine down meets all of
        them; each case starts with another one, because the first finds its states not yet in the
        processor's caches.
    log : AnswerLog
        Where answers are looked up and kept.
    likelihood : bool
        Whether to ask for the likelihood of the accepted answers too. Answers on file that have
        none are given again.
    """
    for mode in modes:
        log.use(mode, mode.as_json(runner.model))
    steps = [
        (case, mode)
        for cases in rows
        for number, case in enumerate(cases)
        for mode in _rotated(modes, number)
    ]
    open_steps = [step for step in steps if not _answered(log.get(*step), likelihood)]
    if not open_steps:
        return
    for mode in modes:  # the first answer of a process pays for what others find loaded
        runner.answer(mode, open_steps[0][0])
    with tqdm(
        total=len(steps),
        initial=len(steps) - len(open_steps),
        desc="Evaluating",
        unit="answer",
        disable=None,
    ) as progress:
        for case, mode in open_steps:
            answer = runner.answer(mode, case)
            if likelihood and answer.text is not None:
                answer = _with_likelihood(runner, mode, case, answer)
            log.add(case, mode, answer)
            progress.update()


def _answered(answer: Answer | None, likelihood: bool) -> bool:
    if answer is None or answer.text is None:
        return answer is not None
    return answer.likelihood is not None or answer.too_long or not likelihood


def _with_likelihood(runner: Runner, mode: Mode, case: Case, answer: Answer) -> Answer:
    try:
        return replace(answer, likelihood=runner.likelihood(mode, case))
    except ContextWindowError:
        return replace(answer, too_long=True)


def _rotated(modes: Sequence[Mode], number: int) -> list[Mode]:
    start = number % len(modes)
    return [*modes[start:], *modes[:start]]


def describe(model: Any, name: str) -> dict[str, Any]:
    """Return what answers of a model depend on."""
    return {
        "model": name,
        "fingerprint": model_fingerprint(model)[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def versions() -> dict[str, Any]:
    """Return what seconds depend on, as far as it can be named."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def summarise(
    rows: Rows, modes: Sequence[Mode], log: AnswerLog, pattern: str | None = None
) -> list[dict[str, Any]]:
    """Score the answers, row by row.

    Parameters
    ----------
    rows, modes, log
        As for :func:`run`, which has run.
    pattern : str, optional
        See :func:`~ape_integrations.evaluation.metrics.score_answer`.

    Returns
    -------
    list of dict
        Per row ``task``, ``documents``, ``cases``, ``encode_seconds`` (median over cases, all
        contexts of a case) and ``modes``: by label what :func:`_mode_summary` returns.
    """
    summary = []
    for cases in rows:
        answers = {
            mode.label: [log.get(case, mode) or Answer(None) for case in cases] for mode in modes
        }
        scores = {
            label: [
                _scores(case, answer, pattern) for case, answer in zip(cases, given, strict=True)
            ]
            for label, given in answers.items()
        }
        encoded = [a.encode for given in answers.values() for a in given if a.encode is not None]
        counts = [len(case.contexts) for case in cases]
        summary.append(
            {
                "task": cases[0].task,
                "documents": cases[0].documents or round(sum(counts) / len(counts), 1),
                "cases": len(cases),
                "encode_seconds": _median(encoded) if encoded else None,
                "modes": {
                    label: _mode_summary(label, answers, scores) for label in answers
                },
            }
        )  # fmt: skip
    return summary


#: By metric; None is a likelihood that was asked for and that the model cannot give.
CaseScores = dict[str, float | None]
Scores = list[CaseScores | None]


def _scores(case: Case, answer: Answer, pattern: str | None) -> CaseScores | None:
    if answer.text is None:
        return None
    scores: CaseScores = {**score_answer(answer.text, case.answers, pattern)}
    if answer.likelihood is not None or answer.too_long:
        scores[LIKELIHOOD] = answer.likelihood
    return scores


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 5)


def _mode_summary(
    label: str, answers: Mapping[str, list[Answer]], scores: Mapping[str, Scores]
) -> dict[str, Any]:
    """Return figures of one mode in one row.

    ``answered`` cases; ``too_long``, if there are any, whose accepted answer has no likelihood;
    ``first_token`` and ``total``, median seconds; each metric's mean; and, if there is a sequential
    run, ``against_sequential``: over the cases that both answered, the ratio of seconds to the
    first token, and per metric the paired difference and the share kept.
    """
    given = [answer for answer in answers[label] if answer.text is not None]
    row: dict[str, Any] = {"answered": len(given)}
    if not given:
        return row
    if too_long := sum(answer.too_long for answer in given):
        row["too_long"] = too_long
    row["prompt_tokens"] = round(sum(a.tokens for a in given) / len(given), 1)
    row["first_token"] = _median([a.first_token for a in given])
    row["total"] = _median([a.total for a in given])
    known = [score for score in scores[label] if score is not None]
    for metric in _common(known):
        values = [value for score in known if (value := score[metric]) is not None]
        if values:
            row[metric] = mean_estimate(values).as_json()
    if BASE in answers and label != BASE:
        row["against_sequential"] = _against(label, answers, scores)
    return row


def _common(scores: Sequence[CaseScores]) -> list[str]:
    """Return the metrics that all scores have."""
    return [metric for metric in METRICS if all(metric in score for score in scores)]


def _against(
    label: str, answers: Mapping[str, list[Answer]], scores: Mapping[str, Scores]
) -> dict[str, Any] | None:
    both = [
        (mine, base, a.first_token, b.first_token)
        for mine, base, a, b in zip(
            scores[label], scores[BASE], answers[label], answers[BASE], strict=True
        )
        if mine is not None and base is not None
    ]
    if not both:
        return None
    result: dict[str, Any] = {
        "cases": len(both),
        "first_token": round(_median([p[2] for p in both]) / _median([p[3] for p in both]), 4),
    }
    for metric in _common([score for pair in both for score in pair[:2]]):
        pairs = [
            (mine, base)
            for p in both
            if (mine := p[0][metric]) is not None and (base := p[1][metric]) is not None
        ]
        if not pairs:
            continue
        difference = paired_difference(*zip(*pairs, strict=True))
        kept = share_kept(difference, sum(base for _, base in pairs) / len(pairs))
        result[metric] = {
            "difference": difference.as_json(),
            "kept": kept.as_json() if kept is not None else None,
        }
    return result
