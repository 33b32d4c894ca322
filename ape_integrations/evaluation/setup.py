"""What to evaluate: a model, its cases, and how to ask; from arguments to something that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import ape_integrations
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.loading import usable_device_map
from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.demo import DEFAULT_GRID, demo_rows, select_grid
from ape_integrations.evaluation.metrics import check_installed, check_pattern
from ape_integrations.evaluation.modes import Runner
from ape_integrations.evaluation.prompts import Case, PromptTemplate
from ape_integrations.evaluation.records import DEFAULT_EXAMPLE, DEFAULT_SPLIT, read_records
from ape_integrations.evaluation.runner import describe
from ape_integrations.models import DEMO_MODEL_NAME, demo_model_path
from ape_integrations.store import MemoryKVStore

#: Kinds and numbers of documents that `tune --demo` scores.
TUNING_GRID: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("single", (8, 16)),
    ("two-hop", (8,)),
    ("unanswerable", (8,)),
    ("follow-up", (8,)),
    ("few-shot", (8,)),
)
_DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class Setup:
    """Everything that cases and answers depend on, besides the mode.

    Parameters
    ----------
    model : str or None
        Name or folder; None is the bundled model.
    data : tuple of str
        Files of records; without any, the cases are those of the bundled model's world.
    kinds : tuple of str
        Only these kinds of question of that world.
    contexts : tuple of int
        Only its rows with these numbers of contexts.
    samples : int or None
        Cases per row, or records per file from the start; None takes 50, and all records.
    seed : int
        Of the cases of that world.
    max_new_tokens : int
        Upper limit of an answer, in tokens.
    template, system : str or None
        Text and system message of the prompts of records.
    completion : bool
        Leave the model's chat template out.
    example, split : str
        See :func:`~ape_integrations.evaluation.records.read_records`.
    stop : tuple of str or None
        Strings to stop before; None is a new line for completions, and nothing for chats.
    pattern : str or None
        See :func:`~ape_integrations.evaluation.metrics.score_answer`.
    dtype : str or None
        Of the weights; None is float32 on a CPU, else that of the checkpoint.
    """

    model: str | None = None
    data: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    samples: int | None = None
    seed: int = 7
    max_new_tokens: int = 48
    template: str | None = None
    system: str | None = None
    completion: bool = False
    example: str = DEFAULT_EXAMPLE
    split: str = DEFAULT_SPLIT
    stop: tuple[str, ...] | None = None
    pattern: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("pattern", "split"):
            check_pattern(getattr(self, name))
        if self.dtype not in (None, *_DTYPES):
            raise ConfigError(f"Unknown dtype {self.dtype!r}. Choose from: {', '.join(_DTYPES)}.")
        if self.seed < 0:
            raise ConfigError(f"The seed must not be negative; {self.seed} is.")
        if self.max_new_tokens < 1 or (self.samples is not None and self.samples < 1):
            raise ConfigError("Samples and new tokens must be at least 1.")
        if (self.kinds or self.contexts) and self.data:
            raise ConfigError("--kind and --contexts choose rows of --demo; a file has none.")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Setup:
        """Read what :meth:`as_json` wrote.

        Raises
        ------
        ConfigError
            It is not the setup of this version of the package.
        """
        hints = get_type_hints(cls)
        if not isinstance(values, Mapping) or set(values) != {field.name for field in fields(cls)}:
            raise ConfigError("The report comes from another version: its setup is not known.")
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        wrong = [name for name, value in lists.items() if not _fits(value, hints[name])]
        if wrong:
            name = wrong[0]
            raise ConfigError(f"The report's setup is damaged: {name} cannot be {values[name]!r}.")
        return cls(**lists)

    def as_json(self) -> dict[str, Any]:
        """Return all settings."""
        return asdict(self)

    @property
    def model_name(self) -> str:
        """The model's name, as reports show it."""
        return self.model or DEMO_MODEL_NAME


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a type, of which a union or a tuple may be made."""
    if isinstance(hint, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, get_args(hint)[0]) for each in value)
    return type(value) is hint


class Session:
    """A loaded model with what asks it.

    Parameters
    ----------
    setup : Setup
    grid : sequence of (str, sequence of int)
        Kinds and numbers of documents of the bundled model's world, of which the setup may choose.

    Raises
    ------
    ConfigError
        There is no such model, or a file of records is wrong.
    UnsupportedModelError
        APE cannot serve the model.
    MissingDependencyError
        torchmetrics, which scores, is not installed.
    """

    def __init__(
        self, setup: Setup, grid: Sequence[tuple[str, Sequence[int]]] = DEFAULT_GRID
    ) -> None:
        check_installed()
        self.setup = setup
        self._grid = select_grid(setup.kinds, setup.contexts, grid)
        records = [
            (Path(name).stem, read_records(
                Path(name), limit=setup.samples, split=setup.split, example=setup.example
            ))
            for name in setup.data
        ]  # fmt: skip
        self._template = _template(setup)
        self.generator = _load(setup)
        tokenizer: Any = self.generator.tokenizer
        self._records = [
            [self._template.case(tokenizer, task, record) for record in some]
            for task, some in records
        ]
        self.runner = Runner(
            self.generator, max_new_tokens=setup.max_new_tokens, stop=self._stop(tokenizer)
        )

    def _stop(self, tokenizer: Any) -> tuple[str, ...]:
        if self.setup.stop is not None:
            return self.setup.stop
        chat = not self.setup.data or self._template.renders_chat(tokenizer)
        return () if chat else ("\n",)

    def rows(self) -> list[list[Case]]:
        """Return the cases, row by row."""
        if self.setup.data:
            return self._records
        samples = self.setup.samples or 50
        return demo_rows(self.generator.tokenizer, self._grid, samples, self.setup.seed)

    def settings(self) -> dict[str, Any]:
        """Return what one answer depends on, besides case and mode."""
        setup = self.setup
        return {
            **describe(self.generator.model, setup.model_name),
            "max_new_tokens": setup.max_new_tokens,
            "stop": list(self._stop(self.generator.tokenizer)),
            "package": ape_integrations.__version__,
        }


def _template(setup: Setup) -> PromptTemplate:
    texts = (
        {} if setup.template is None else dict.fromkeys(("question", "few_shot"), setup.template)
    )
    return PromptTemplate(**texts, system=setup.system, chat=not setup.completion)


def _load(setup: Setup) -> APEGenerator:
    device_map = usable_device_map("auto")
    dtype = setup.dtype or ("float32" if device_map is None else "auto")
    placed = {} if device_map is None else {"device_map": device_map}
    name = setup.model or demo_model_path()
    return APEGenerator.from_pretrained(name, store=MemoryKVStore("2GB"), dtype=dtype, **placed)
