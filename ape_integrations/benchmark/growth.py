"""How time to first token and memory grow with the contexts.

Each size and mode is measured in a fresh process, so that no memory of another one counts. What is
stored are random numbers of the right shapes: neither time nor memory depends on them, and nobody
has to encode 32K tokens first.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ape_integrations.benchmark.memory import peak_bytes, reset_peak, used_bytes
from ape_integrations.benchmark.runner import Workload
from ape_integrations.benchmark.shapes import load_model
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generation import GenerationResult
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.store import DiskKVStore, KVStates, MemoryKVStore

#: Modes, and how many copies of the KV states each holds: a store in memory is one more.
COPIES = {"ape disk": 1, "ape ram": 2, "sequential": 1}
MODES = tuple(COPIES)

#: What is measured where the caller names none: a sequential prefill of 32K takes minutes.
DEFAULT_MODES = ("ape disk", "ape ram")

#: Context tokens of a growth run where the caller names none.
SIZES = (2048, 8192, 32768)


@dataclass(frozen=True)
class Source:
    """The model of a run, by name, so that another process can load it.

    Parameters
    ----------
    model : str or None
        Hub name or directory; None takes ``shape``.
    shape, dtype, device : str
        Shape with random weights, and how to load.
    threads : int or None
        CPU threads; None leaves torch's choice.
    """

    model: str | None
    shape: str
    dtype: str
    device: str
    threads: int | None

    def generator(self, store: Any) -> APEGenerator:
        """Load the model."""
        if self.threads:
            torch.set_num_threads(self.threads)
        model, tokenizer = load_model(self.model, self.shape, self.dtype, self.device)
        return APEGenerator(model, tokenizer, store, APEConfig(prefill="cached"))


def growth(
    source: Source,
    workloads: Sequence[Workload],
    modes: Sequence[str] = DEFAULT_MODES,
    repetitions: int = 3,
    directory: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure each workload in each mode.

    Returns
    -------
    list of dict
        Per workload and mode: ``workload``, ``mode``, ``kv_bytes`` (one copy of the states),
        ``kv_in_use`` (all copies that the mode holds), ``first_token`` (seconds, median),
        ``model_bytes`` (memory before the first request), ``peak_bytes``, and ``overhead``:
        memory beyond the model per byte of states in use.
    """
    rows = []
    steps = [(workload, mode) for workload in workloads for mode in modes]
    for workload, mode in tqdm(steps, desc="Growth", unit="run", disable=None):
        with tempfile.TemporaryDirectory(dir=directory, prefix="ape-growth-") as folder:
            if mode != "sequential":
                _in_fresh_process(_fill, source, workload, folder)
            rows.append(_in_fresh_process(_measure, source, workload, folder, mode, repetitions))
    return rows


def _in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _fill(source: Source, workload: Workload, folder: str) -> None:
    """Store random states for every context of the workload's prompt."""
    with DiskKVStore(folder, size_limit="1TB") as store:
        generator = source.generator(store)
        prompt = _prompt(generator, workload)
        keys = generator._source.keys(prompt.prefix, prompt.contexts)
        random = torch.Generator().manual_seed(0)
        for key, ids in zip(keys, prompt.contexts, strict=True):
            layers = generator.info.spec(len(ids)).allocate()
            for tensor in (tensor for pair in layers for tensor in pair):
                tensor.normal_(generator=random)
            store.put(key, KVStates([k for k, _ in layers], [v for _, v in layers]))


def _prompt(generator: APEGenerator, workload: Workload) -> PreparedPrompt:
    embeddings: Any = generator.model.get_input_embeddings()
    return workload.prompt(embeddings.weight.shape[0], seed=0)


def _measure(
    source: Source, workload: Workload, folder: str, mode: str, repetitions: int
) -> dict[str, Any]:
    memory = MemoryKVStore("1TB")
    disk = DiskKVStore(folder, size_limit="1TB")
    generator = source.generator(memory if mode == "ape ram" else disk)
    prompt = _prompt(generator, workload)
    nbytes = generator.info.spec(prompt.layout.total).nbytes
    # Every code path once, with a short prompt.
    _answer(generator, Workload(2, 16, 4, 4, 2).prompt(100, seed=1))
    generator.clear_assembled()
    model_bytes = used_bytes()
    reset_peak()
    if mode == "ape ram":
        keys = generator._source.keys(prompt.prefix, prompt.contexts)
        for key, ids in zip(keys, prompt.contexts, strict=True):
            if (states := disk.get(key, generator.info.spec(len(ids)))) is not None:
                memory.put(key, states)
            del states  # or what was stored last would count twice
    if mode == "sequential":
        prompt = prompt.flat()
    seconds = []
    for _ in range(repetitions):
        generator.clear_assembled(keep_memory=True)
        result = _answer(generator, prompt)
        if result.cache["misses"]:
            raise RuntimeError("Stored states were not found again: nothing could be measured.")
        seconds.append(result.timings["first_token"])
    peak, in_use = peak_bytes(), nbytes * COPIES[mode]
    known = peak is not None and model_bytes is not None
    return {
        "workload": asdict(workload),
        "mode": mode,
        "kv_bytes": nbytes,
        "kv_in_use": in_use,
        "first_token": statistics.median(seconds),
        "model_bytes": model_bytes,
        "peak_bytes": peak,
        "overhead": (peak - model_bytes) / in_use if known else None,  # type: ignore[operator]
    }


def _answer(generator: APEGenerator, prompt: PreparedPrompt) -> GenerationResult:
    return generator.generate_ids(prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
