"""Arguments of the benchmark command."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ape_integrations.benchmark.report import print_table, save_plot
from ape_integrations.benchmark.runner import MODES, Benchmark, Workload
from ape_integrations.benchmark.shapes import SHAPES, random_model
from ape_integrations.errors import ConfigError


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Time to first token and decoding: sequential prefill against APE, in turn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="Hub name or directory of a model")
    source.add_argument("--shape", default="smollm2-135m", choices=SHAPES, help="random weights")
    parser.add_argument("--contexts", type=int, nargs="+", default=[16], help="numbers of contexts")
    parser.add_argument("--context-tokens", type=int, default=512, help="tokens of each context")
    parser.add_argument("--query-tokens", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="MODE")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--directory", type=Path, help="where the on-disk store is made")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="save a plot (PNG); needs matplotlib")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the benchmark command."""
    parser = build_parser(prog)
    arguments = parser.parse_args(argv)
    try:
        report = run(arguments)
    except ConfigError as error:
        parser.error(str(error))
    if arguments.as_json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report["results"])
    if arguments.plot is not None:
        save_plot(report["results"], arguments.plot)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for."""
    if (
        min(
            *arguments.contexts,
            arguments.context_tokens,
            arguments.query_tokens,
            arguments.new_tokens,
            arguments.repetitions,
        )
        < 1
    ):
        raise ConfigError("Counts and lengths must be at least 1.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        model.to(arguments.device)
    else:
        model, tokenizer = random_model(arguments.shape, dtype, arguments.device)
    benchmark = Benchmark(model, tokenizer, arguments.modes, arguments.directory)
    results = [
        benchmark.run(
            Workload(
                contexts=count,
                context_tokens=arguments.context_tokens,
                query_tokens=arguments.query_tokens,
                new_tokens=arguments.new_tokens,
            ),
            arguments.repetitions,
        )
        for count in arguments.contexts
    ]
    return {
        "model": arguments.model or f"{arguments.shape} (random weights)",
        "dtype": arguments.dtype,
        "device": _device_name(arguments.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": results,
    }


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
