"""Commands that score answers: ``eval`` and ``tune``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ape_integrations.cli.options import AsJson, print_json
from ape_integrations.errors import ConfigError

Demo = Annotated[bool, typer.Option("--demo", help="Held-out tasks of the bundled model's world.")]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        help="JSON Lines: {question, contexts, answers} or {examples, input, answers}; repeatable."
    ),
]
ModelName = Annotated[
    str | None, typer.Option(help="Name or folder of a model. Default: the bundled one.")
]
Kind = Annotated[
    list[str] | None, typer.Option(help="Of --demo, only this kind of question; repeatable.")
]
Contexts = Annotated[
    list[int] | None, typer.Option(help="Of --demo, only rows with so many contexts; repeatable.")
]
Template = Annotated[
    Path | None, typer.Option(help="File with the prompt's text: {contexts} and {question}.")
]
System = Annotated[str | None, typer.Option(help="System message of the prompts.")]
Completion = Annotated[
    bool, typer.Option("--completion", help="Leave the model's chat template out.")
]
Example = Annotated[str | None, typer.Option(help="Text of an example: {input} and {output}.")]
Split = Annotated[
    str | None, typer.Option(help="Regular expression that cuts a string of contexts.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="String to stop before; repeatable. Default of completions: a new line."),
]
Pattern = Annotated[
    str | None,
    typer.Option("--answer-pattern", help="Regular expression of the part of an answer to score."),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Upper limit of an answer, in tokens.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or auto. Default: float32 on a CPU.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: the best there is.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the cases of --demo.")]

#: What --check takes from the report.
_OF_THE_REPORT = (
    *("demo", "data", "model", "samples", "seed", "template", "system", "completion", "example"),
    *("split", "stop", "answer_pattern", "max_new_tokens", "dtype"),
)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("eval")(evaluate)
    app.command("tune")(tune)


def evaluate(
    context: typer.Context,
    demo: Demo = False,
    data: Data = None,
    model: ModelName = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="sequential, parallel, prefix, ape, tuned, recompute=RATIO, ordered, select=K, "
            "count; settings behind a colon (ape:T=0.8,S=1); repeatable. "
            "Default: sequential, parallel, prefix, ape."
        ),
    ] = None,
    kind: Kind = None,
    contexts: Contexts = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Cases per row. Default: 50, or the whole file.")
    ] = None,
    seed: Seed = 7,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="match, exact_match, f1, contains, rouge_l or likelihood for table and plot; "
            "repeatable."
        ),
    ] = None,
    template: Template = None,
    system: System = None,
    completion: Completion = False,
    example: Example = None,
    split: Split = None,
    stop: Stop = None,
    answer_pattern: Pattern = None,
    max_new_tokens: NewTokens = 48,
    dtype: Dtype = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Keep every answer in this file, and go on from what it holds."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Run again what this JSON report was made with; status 1 if a mean leaves its "
            "interval. Of what to run, --mode, --kind and --contexts choose a part."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Save a plot (PNG); needs matplotlib.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score answers of sequential prompts, parallel encoding, APE and its options, side by side.

    Seconds to the first token are taken with the contexts' states in memory.
    """
    from ape_integrations.evaluation.command import DEFAULT_MODES, report
    from ape_integrations.evaluation.metrics import LIKELIHOOD, check_metrics
    from ape_integrations.evaluation.report import (
        disagreements,
        measured,
        print_report,
        save_plot,
    )
    from ape_integrations.evaluation.setup import Setup
    from ape_integrations.outputs import check_plot

    known = None
    if check is not None:
        _refuse_beside_check(context)
        known = _read_report(check)
        setup, labels = Setup.from_json(known.get("setup")), _known_modes(known, mode)
        rows: dict[str, Any] = {"kinds": tuple(kind or ()), "contexts": tuple(contexts or ())}
        setup = replace(setup, **{name: chosen for name, chosen in rows.items() if chosen})
    else:
        _one_source(demo, data)
        setup = Setup(
            model=model,
            data=tuple(map(str, data or ())),
            kinds=tuple(kind or ()),
            contexts=tuple(contexts or ()),
            samples=samples,
            seed=seed,
            max_new_tokens=max_new_tokens,
            **_asking(template, system, completion, example, split, stop, answer_pattern, dtype),
        )
        labels = mode or list(DEFAULT_MODES)
    metrics = metric or (["exact_match", "f1", "rouge_l"] if setup.data else ["match"])
    check_metrics(metrics)
    if plot is not None:
        check_plot(plot)
    asked = {*metrics, *(measured(known) if known else ())}
    result = report(setup, labels, answers, likelihood=LIKELIHOOD in asked)
    if as_json:
        print_json(result)
    else:
        print_report(result, metrics)
    if plot is not None:
        save_plot(result, metrics[0], plot)
    if known is not None:
        _say_whether_equal(disagreements(known, result))


def tune(
    demo: Demo = False,
    data: Data = None,
    model: ModelName = None,
    kind: Kind = None,
    contexts: Contexts = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Cases per row. Default: 50, or the whole file.")
    ] = None,
    seed: Seed = 8,
    metric: Annotated[
        str | None,
        typer.Option(
            help="match, exact_match, f1, contains, rouge_l or likelihood. Default: match of "
            "--demo, else f1."
        ),
    ] = None,
    temperatures: Annotated[
        str | None, typer.Option("--temperature", help="Values of T to try, such as 0.8,0.9,1.")
    ] = None,
    scales: Annotated[
        str | None, typer.Option("--scale", help="Values of S to try, with the best T.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Parts of the cross-validation.")] = 5,
    template: Template = None,
    system: System = None,
    completion: Completion = False,
    example: Example = None,
    split: Split = None,
    stop: Stop = None,
    answer_pattern: Pattern = None,
    max_new_tokens: NewTokens = 48,
    dtype: Dtype = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the result. Default: in the user's data.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose T and S for a model on a labelled sample, by the score of the task.

    The result is saved for APEConfig.from_tuned(model). The defaults stay where the gain of others
    may be chance.
    """
    from ape_integrations.evaluation.command import tune_model
    from ape_integrations.evaluation.metrics import check_metrics
    from ape_integrations.evaluation.report import print_tuning
    from ape_integrations.evaluation.setup import Setup
    from ape_integrations.evaluation.tuning import SCALES, TEMPERATURES

    _one_source(demo, data)
    chosen = metric or ("f1" if data else "match")
    check_metrics([chosen])
    setup = Setup(
        model=model,
        data=tuple(map(str, data or ())),
        kinds=tuple(kind or ()),
        contexts=tuple(contexts or ()),
        samples=samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        **_asking(template, system, completion, example, split, stop, answer_pattern, dtype),
    )
    result, path = tune_model(
        setup,
        chosen,
        temperatures=_numbers(temperatures) or TEMPERATURES,
        scales=_numbers(scales) or SCALES,
        folds=folds,
        out=out,
    )
    if as_json:
        print_json({**result, "saved": str(path)})
    else:
        print_tuning(result)
        typer.echo(f"Saved in {path}.")


def _one_source(demo: bool, data: list[Path] | None) -> None:
    if demo == bool(data):
        raise ConfigError(
            "Say what to evaluate on: --demo is the bundled model's world, --data a file of "
            "questions. One of the two."
        )


def _asking(
    template: Path | None,
    system: str | None,
    completion: bool,
    example: str | None,
    split: str | None,
    stop: list[str] | None,
    pattern: str | None,
    dtype: str | None,
) -> dict[str, Any]:
    """Return how to ask, as settings; what was not said keeps its default."""
    said: dict[str, Any] = {
        "template": None if template is None else _read_text(template),
        "system": system,
        "completion": completion,
        "example": None if example is None else _unescaped(example),
        "split": split,
        "stop": None if stop is None else tuple(map(_unescaped, stop)),
        "pattern": pattern,
        "dtype": dtype,
    }
    return {name: value for name, value in said.items() if value is not None}


def _unescaped(text: str) -> str:
    r"""Turn ``\n`` and ``\t``, as shells hand them on, into what they stand for."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}.") from error


def _read_report(path: Path) -> Any:
    from ape_integrations.evaluation.report import is_report

    text = _read_text(path)
    try:
        report = json.loads(text)
    except (ValueError, RecursionError):
        report = None
    if not is_report(report):
        raise ConfigError(
            f"{path} is no report of `ape-integrations eval --json` with a mean to compare. Name "
            "one, or make it anew."
        )
    return report


def _known_modes(report: Any, labels: list[str] | None) -> list[str]:
    """Return the modes to run again: those asked for, which the report must have, or all."""
    for label in labels or ():
        if label not in report["modes"]:
            raise ConfigError(
                f"Mode {label!r} is not in the report. Choose from: {', '.join(report['modes'])}."
            )
    return labels or list(report["modes"])


def _refuse_beside_check(context: typer.Context) -> None:
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in _OF_THE_REPORT and source is not None and source.name != "DEFAULT":
            raise ConfigError(
                f"{parameter.opts[0]} has no place beside --check, which asks as the report says. "
                "Leave it out; --mode, --kind and --contexts choose a part of the report."
            )


def _say_whether_equal(disagreements: list[str]) -> None:
    for line in disagreements:
        typer.echo(line, err=True)
    if disagreements:
        raise typer.Exit(1)
    typer.echo("Every mean lies in its interval of the earlier report.", err=True)


def _numbers(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{text!r} is no list of numbers such as 0.8,0.9,1.") from None
