"""The same held-out cases, encoded sequentially, in parallel, and with APE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.demo import (
    DEFAULT_GRID,
    Case,
    Generate,
    evaluate,
    sequential_generator,
)
from ape_integrations.models import DEMO_MODEL_NAME, demo_model_path

#: Ways to encode the contexts of a prompt.
MODES = {
    "sequential": "one ordinary prompt",
    "parallel": "each context alone behind the prefix, T = S = 1",
    "ape": "as parallel, with the default T and S",
}


def compare(
    model_name: str | None,
    modes: Sequence[str],
    *,
    samples: int = 50,
    seed: int = 7,
    kinds: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score several modes on the same cases.

    Parameters
    ----------
    model_name : str or None
        Name or folder of a model; None is the bundled one.
    modes : sequence of str
        Which of :data:`MODES`.
    samples, seed : int
        Cases per row, and their seed.
    kinds : sequence of str, optional
        Only these kinds of question.

    Returns
    -------
    dict
        ``model``, ``samples``, ``seed`` and ``rows``: per task and number of documents the share
        of exact matches of each mode.

    Raises
    ------
    ConfigError
        No such kind of question.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = [kind for kind, _ in DEFAULT_GRID]
    unknown = [kind for kind in kinds or [] if kind not in known]
    if unknown:
        raise ConfigError(f"Unknown kind {unknown[0]!r}. Choose from: {', '.join(known)}.")
    grid = [cell for cell in DEFAULT_GRID if not kinds or cell[0] in kinds]
    path = model_name or demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    total = len(modes) * samples * sum(len(counts) for _, counts in grid)
    with tqdm(total=total, desc="Evaluating", unit="case", disable=None) as progress:

        def advance(case: Case, text: str) -> None:
            progress.update()

        for mode in modes:
            generate = _generator(mode, model, tokenizer)
            scores = evaluate(
                generate,
                tokenizer,
                grid=grid,
                samples=samples,
                seed=seed,
                on_case=advance,
            )
            for score in scores:
                cell = rows.setdefault(
                    (score.kind, score.documents),
                    {"task": score.kind, "documents": score.documents},
                )
                cell[mode] = score.accuracy
    return {
        "model": model_name or DEMO_MODEL_NAME,
        "samples": samples,
        "seed": seed,
        "rows": list(rows.values()),
    }


def _generator(mode: str, model: Any, tokenizer: Any) -> Generate:
    if mode == "sequential":
        return sequential_generator(model, tokenizer)
    from ape_integrations.core.config import APEConfig
    from ape_integrations.core.generator import APEGenerator
    from ape_integrations.store import MemoryKVStore

    config = APEConfig()
    if mode == "parallel":
        config = APEConfig(attention_temperature=1.0, scaling_factor=1.0)
    generator = APEGenerator(model, tokenizer, MemoryKVStore("256MB"), config)

    def generate(prefix: str, contexts: Sequence[str], query: str) -> str:
        result = generator.generate(prefix, contexts, query, max_new_tokens=48, do_sample=False)
        return result.text

    return generate
