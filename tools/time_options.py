"""Time what answers better than plain APE costs, on a model of real shape with random weights.

::

    python tools/time_options.py --shape smollm2-135m --contexts 16 --context-tokens 128

States of the contexts are in memory, as they are in a pipeline whose documents are encoded. Modes
run in turn, so that whatever slows the machine down meets all of them; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ape_integrations.benchmark.runner import Workload
from ape_integrations.benchmark.shapes import SHAPES, random_model
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.evaluation.modes import parse_mode
from ape_integrations.store import MemoryKVStore

MODES = ("prefix", "ordered", "select=4", "recompute=0.001", "recompute=0.15", "recompute=0.5")


def main(argv: Sequence[str] | None = None) -> None:
    """Time every mode and print seconds to the first token as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--context-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    arguments = parser.parse_args(argv)
    model, tokenizer = random_model(arguments.shape, torch.float32, "cpu")
    work = Workload(arguments.contexts, arguments.context_tokens)
    embeddings: Any = model.get_input_embeddings()
    prompt = work.prompt(embeddings.weight.shape[0], seed=0)
    read = [token for context in prompt.contexts for token in context]
    whole = PreparedPrompt([], [], [*prompt.prefix, *read, *prompt.query])
    store = MemoryKVStore("1TB")
    generators = {
        label: APEGenerator(model, tokenizer, store, parse_mode(label).config(model))
        for label in arguments.modes
    }
    base = next(iter(generators.values()))
    taken: dict[str, list[float]] = {"sequential": [], **{label: [] for label in generators}}
    for _ in range(arguments.repetitions + 1):
        taken["sequential"].append(first_token(base, whole))
        for label, generator in generators.items():
            taken[label].append(first_token(generator, prompt))
    medians = {label: statistics.median(times[1:]) for label, times in taken.items()}
    print(
        json.dumps(
            {
                "shape": arguments.shape,
                "contexts": arguments.contexts,
                "context_tokens": arguments.context_tokens,
                "threads": torch.get_num_threads(),
                "first_token": {label: round(value, 3) for label, value in medians.items()},
                "of_sequential": {
                    label: round(value / medians["sequential"], 3)
                    for label, value in medians.items()
                },
            },
            indent=2,
        )
    )


def first_token(generator: APEGenerator, prompt: PreparedPrompt) -> float:
    """Return the seconds to the first token, nothing being assembled yet."""
    result = generator.generate_ids(prompt, max_new_tokens=1, do_sample=False)
    generator.clear_assembled(keep_memory=True)
    return result.timings["first_token"]


if __name__ == "__main__":
    main()
