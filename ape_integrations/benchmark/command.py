"""Arguments of the benchmark command."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ape_integrations.benchmark.growth import DEFAULT_MODES, SIZES, Source, growth
from ape_integrations.benchmark.growth import MODES as GROWTH_MODES
from ape_integrations.benchmark.report import print_growth, print_table, save_growth, save_plot
from ape_integrations.benchmark.runner import MODES, Benchmark, Workload
from ape_integrations.benchmark.shapes import SHAPES, load_model
from ape_integrations.errors import ConfigError
from ape_integrations.outputs import check_folder, check_plot


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
    parser.add_argument("--turn-tokens", type=int, default=24, help="of a chat's second question")
    parser.add_argument(
        "--growth",
        type=int,
        nargs="*",
        metavar="TOKENS",
        help="time and memory over so many context tokens in all, each in a fresh process "
        f"(default: {' '.join(map(str, SIZES))})",
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        metavar="MODE",
        help=f"of: {', '.join(MODES)}; with --growth: {', '.join(GROWTH_MODES)}",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="call the model's compile() first, for sequential runs too",
    )
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
    elif arguments.growth is not None:
        print_growth(report["results"])
    else:
        print_table(report["results"])
    if arguments.plot is not None:
        save = save_plot if arguments.growth is None else save_growth
        save(report["results"], arguments.plot)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for."""
    counts = (
        *arguments.contexts,
        *(arguments.growth or ()),
        arguments.context_tokens,
        arguments.query_tokens,
        arguments.new_tokens,
        arguments.turn_tokens,
        arguments.repetitions,
    )
    if min(counts) < 1:
        raise ConfigError("Counts and lengths must be at least 1.")
    if arguments.plot is not None:
        check_plot(arguments.plot)
    if arguments.directory is not None:
        check_folder(arguments.directory, "--directory")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    _check_device(arguments.device)
    results = _compare(arguments) if arguments.growth is None else _grow(arguments)
    return {
        "model": arguments.model or f"{arguments.shape} (random weights)",
        "dtype": arguments.dtype,
        "device": _device_name(arguments.device),
        "threads": torch.get_num_threads(),
        "compiled": arguments.compile,
        "torch": torch.__version__,
        "results": results,
    }


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--device {name!r} cannot be used here: {reason}") from error


def _workload(arguments: argparse.Namespace, contexts: int) -> Workload:
    return Workload(
        contexts=contexts,
        context_tokens=arguments.context_tokens,
        query_tokens=arguments.query_tokens,
        new_tokens=arguments.new_tokens,
        turn_tokens=arguments.turn_tokens,
    )


def _compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all modes side by side in this process."""
    model, tokenizer = load_model(
        arguments.model, arguments.shape, arguments.dtype, arguments.device
    )
    if arguments.compile:
        # Sequential runs, batches and chats each bring shapes of their own.
        torch._dynamo.config.recompile_limit = 64
        model.compile()
    benchmark = Benchmark(
        model,
        tokenizer,
        arguments.modes or tuple(MODES),
        arguments.directory,
        rehearse=arguments.compile,
    )
    return [
        benchmark.run(_workload(arguments, count), arguments.repetitions)
        for count in arguments.contexts
    ]


def _grow(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure how time and memory grow, each size in a process of its own."""
    unknown = [mode for mode in arguments.modes or () if mode not in GROWTH_MODES]
    if unknown:
        raise ConfigError(f"--growth knows no mode {unknown[0]!r}: {', '.join(GROWTH_MODES)}.")
    if arguments.compile:
        raise ConfigError("--compile goes without --growth.")
    size = arguments.context_tokens
    workloads = [_workload(arguments, max(1, total // size)) for total in arguments.growth or SIZES]
    source = Source(
        arguments.model, arguments.shape, arguments.dtype, arguments.device, arguments.threads
    )
    modes = arguments.modes or DEFAULT_MODES
    return growth(source, workloads, modes, arguments.repetitions, arguments.directory)


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
