"""Runs every mode in turn, several times, and keeps medians."""

from __future__ import annotations

import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from ape_integrations.benchmark.memory import peak_bytes, reset_peak
from ape_integrations.core.config import APEConfig
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.prepared import PreparedPrompt
from ape_integrations.core.products import fast_products
from ape_integrations.store import DiskKVStore, MemoryKVStore

#: What each mode is; the order of a run.
MODES = {
    "sequential": "the whole prompt in one prefill (transformers, the model's own attention)",
    "sequential, fast products": "the same with the matrix products that APE uses on this CPU",
    "prefix cache": "transformers' DynamicCache reused: same documents in the same order",
    "ape cold": "every context encoded, nothing stored yet",
    "ape disk": "states from disk, page cache warm, contexts assembled anew",
    "ape disk, uncached": "states from disk, page cache dropped for the store's files",
    "ape ram": "states from the memory tier, contexts assembled anew",
    "ape ram, fresh memory": "the same into memory that was never used, as a first question does",
    "ape same set": "another question about the same documents: contexts stand assembled",
    "ape chat, turn 2": "the next turn over the same documents, behind the first turn's states",
    "ape batch of 8": "eight questions over one set together; time per question",
    "floor": "one query forward over an assembled cache, plus one copy of the KV bytes",
}


@dataclass(frozen=True)
class Workload:
    """One size to measure.

    Parameters
    ----------
    contexts, context_tokens : int
        Number of contexts and tokens of each.
    prefix_tokens, query_tokens, new_tokens : int
        Tokens before and behind the contexts, and to generate.
    turn_tokens : int
        Tokens of a chat's second question, its turn's markers included.
    """

    contexts: int = 16
    context_tokens: int = 512
    prefix_tokens: int = 20
    query_tokens: int = 40
    new_tokens: int = 32
    turn_tokens: int = 24

    def prompt(self, vocabulary: int, seed: int) -> PreparedPrompt:
        """Return random token ids of these sizes."""
        draw = random.Random(seed)

        def ids(count: int) -> list[int]:
            return [draw.randrange(10, vocabulary) for _ in range(count)]

        return PreparedPrompt(
            ids(self.prefix_tokens),
            [ids(self.context_tokens) for _ in range(self.contexts)],
            ids(self.query_tokens),
        )


@dataclass
class Measurement:
    """Figures of one mode over all repetitions.

    Parameters
    ----------
    first_token, decode, total : list of float
        Seconds: to the first token, per further token, end to end.
    bytes_loaded : int
        Bytes read from the store, at most.
    peak_bytes : int or None
        Highest memory of the process (CPU) or device (CUDA) during the mode.
    """

    first_token: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    bytes_loaded: int = 0
    peak_bytes: int | None = None

    def summary(self) -> dict[str, Any]:
        """Return medians and the range of the time to first token."""
        return {
            "first_token": statistics.median(self.first_token),
            "first_token_range": [min(self.first_token), max(self.first_token)],
            "decode": statistics.median(self.decode) if self.decode else None,
            "total": statistics.median(self.total) if self.total else None,
            "bytes_loaded": self.bytes_loaded,
            "peak_bytes": self.peak_bytes,
            "repetitions": len(self.first_token),
        }


class Benchmark:
    """Measures one model over several workloads.

    Parameters
    ----------
    model, tokenizer
        The model and its tokenizer.
    modes : sequence of str
        Which of :data:`MODES`.
    directory : Path, optional
        Where the on-disk store is made; a temporary directory where none is given.
    rehearse : bool
        Run each mode once without measuring it, as a model that is compiled on the way needs it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        modes: Sequence[str] = tuple(MODES),
        directory: Path | None = None,
        *,
        rehearse: bool = False,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._modes = [mode for mode in MODES if mode in modes]
        self._directory = directory
        self._rehearse = rehearse
        embeddings: Any = model.get_input_embeddings()
        self._vocabulary: int = embeddings.weight.shape[0]

    def run(self, workload: Workload, repetitions: int = 3) -> dict[str, Any]:
        """Measure all modes of one workload, in turn, ``repetitions`` times.

        Returns
        -------
        dict
            ``workload``, ``kv_bytes``, ``modes`` (summaries) and ``ratios`` to sequential.
        """
        with tempfile.TemporaryDirectory(dir=self._directory, prefix="ape-bench-") as folder:
            session = _Session(self._model, self._tokenizer, self._vocabulary, workload, folder)
            measured = {mode: Measurement() for mode in self._modes}
            session.prepare()
            for mode in self._modes if self._rehearse else ():
                session.measure(mode, Measurement())
            steps = [mode for _ in range(repetitions) for mode in self._modes]
            for mode in tqdm(steps, desc="Benchmark", unit="run", disable=None):
                session.measure(mode, measured[mode])
            modes = {mode: figures.summary() for mode, figures in measured.items()}
            return {
                "workload": asdict(workload),
                "kv_bytes": session.kv_bytes,
                "modes": modes,
                "ratios": ratios(modes),
            }


def ratios(modes: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how many times faster than sequential each mode is."""
    base = modes.get("sequential")
    if base is None:
        return {}
    return {
        mode: {
            name: base[name] / figures[name]
            for name in ("first_token", "decode", "total")
            if base[name] and figures[name]
        }
        for mode, figures in modes.items()
        if mode != "sequential"
    }


class _Session:
    """One workload on one model: prompts, stores, and how to run each mode."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        workload: Workload,
        folder: str,
    ) -> None:
        self._workload = workload
        self._vocabulary = vocabulary
        self._folder = Path(folder)
        self._disk = DiskKVStore(self._folder / "store", size_limit="1TB")
        config = APEConfig(prefill="cached")  # each mode is what it says, however slow
        self._ram = MemoryKVStore("1TB")
        self._on_disk = APEGenerator(model, tokenizer, self._disk, config)
        self._in_ram = APEGenerator(model, tokenizer, self._ram, config)
        self._prompt = workload.prompt(vocabulary, seed=0)
        self._cold_runs = 0
        self._questions = 0
        self._prefix_cache: DynamicCache | None = None
        self._copy = _CopyRate()
        self.kv_bytes = self._on_disk.info.spec(self._prompt.layout.total).nbytes
        self._steps: dict[str, Callable[[], Any]] = {
            "sequential": self._sequential,
            "sequential, fast products": lambda: self._generate(self._on_disk, self._prompt.flat()),
            "prefix cache": self._prefix,
            "ape cold": self._cold,
            "ape disk": lambda: self._warm(self._on_disk),
            "ape disk, uncached": self._uncached,
            "ape ram": lambda: self._warm(self._in_ram),
            "ape ram, fresh memory": lambda: self._warm(self._in_ram, keep_memory=False),
            "ape same set": self._same_set,
            "ape chat, turn 2": self._chat,
            "ape batch of 8": self._batch,
        }

    def prepare(self) -> None:
        """Fill both stores and touch every code path once, with a short prompt first."""
        short = Workload(2, 16, 4, 4, 2).prompt(self._vocabulary, seed=1)
        for generator in (self._on_disk, self._in_ram):
            generator.generate_ids(short, max_new_tokens=2, do_sample=False)
            generator.generate_ids(self._prompt, max_new_tokens=2, do_sample=False)

    def measure(self, mode: str, figures: Measurement) -> None:
        """Run ``mode`` once and add what it took."""
        gc.collect()
        reset_peak()
        if mode == "floor":
            figures.first_token.append(self._floor())
        else:
            result = self._steps[mode]()
            first, total = result.timings["first_token"], result.timings["total"]
            figures.first_token.append(first)
            figures.total.append(total)
            if len(result.token_ids) > 1:
                figures.decode.append((total - first) / (len(result.token_ids) - 1))
            figures.bytes_loaded = max(figures.bytes_loaded, result.cache["bytes_loaded"])
        peak = peak_bytes()
        if peak is not None:
            figures.peak_bytes = max(peak, figures.peak_bytes or 0)

    def _generate(self, generator: APEGenerator, prompt: PreparedPrompt) -> Any:
        count = self._workload.new_tokens
        return generator.generate_ids(
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )

    def _sequential(self) -> Any:
        """Generate as transformers does, with nothing of ours in between."""
        ids = torch.tensor([self._prompt.flat().query], device=self._on_disk.info.input_device)
        count, times = self._workload.new_tokens, _TokenTimes()
        start = time.perf_counter()
        self._on_disk.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            streamer=times,
        )
        total = time.perf_counter() - start
        return _Plain(times.first - start, total, count)

    def _prefix(self) -> Any:
        """Reuse a cache of prefix and contexts as transformers alone can."""
        model, ids = self._on_disk.model, torch.tensor([self._prompt.flat().query])
        ids = ids.to(self._on_disk.info.input_device)
        known = ids.shape[1] - len(self._prompt.query)
        with torch.no_grad():
            if self._prefix_cache is None:
                self._prefix_cache = DynamicCache()
                model(ids[:, :known], past_key_values=self._prefix_cache, logits_to_keep=1)
            cache = self._prefix_cache
            count = self._workload.new_tokens
            start = time.perf_counter()
            model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
            first = time.perf_counter() - start
            cache.crop(known - cache.get_seq_length())
            start = time.perf_counter()
            model.generate(
                ids,
                past_key_values=cache,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
            total = time.perf_counter() - start
            cache.crop(known - cache.get_seq_length())
        return _Plain(first, total, count)

    def _cold(self) -> Any:
        """Use prompts that were never seen, so that every context is a miss."""
        self._cold_runs += 1
        self._on_disk.clear_assembled()
        prompt = self._workload.prompt(self._vocabulary, seed=100 + self._cold_runs)
        return self._generate(self._on_disk, prompt)

    def _warm(self, generator: APEGenerator, *, keep_memory: bool = True) -> Any:
        # Another set takes the buffers over, as in a pipeline whose documents change.
        generator.clear_assembled(keep_memory=keep_memory)
        return self._generate(generator, self._prompt)

    def _asking(self, seed: int) -> PreparedPrompt:
        """Return a prompt with the same contexts and another query."""
        return replace(self._prompt, query=self._workload.prompt(self._vocabulary, seed).query)

    def _same_set(self) -> Any:
        self._in_ram.generate_ids(self._prompt, max_new_tokens=1, do_sample=False)
        self._questions += 1  # one that was asked before would start from its own states
        return self._generate(self._in_ram, self._asking(1000 + self._questions))

    def _chat(self) -> Any:
        first = self._warm(self._on_disk)
        turn = replace(self._workload, query_tokens=self._workload.turn_tokens)
        question = turn.prompt(self._vocabulary, seed=3).query
        history = [*self._prompt.query, *first.token_ids, *question]
        return self._generate(self._on_disk, replace(self._prompt, query=history))

    def _batch(self) -> Any:
        """Return the figures of one question: an eighth of the whole batch."""
        self._in_ram.generate_ids(self._prompt, max_new_tokens=1, do_sample=False)
        self._questions += 8
        prompts = [self._asking(1000 + self._questions - number) for number in range(8)]
        count = self._workload.new_tokens
        start = time.perf_counter()
        results = self._in_ram.generate_batch_ids(
            prompts, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        total = time.perf_counter() - start
        return _Plain(results[0].timings["first_token"] / 8, total / 8, count)

    def _uncached(self) -> Any:
        _drop_page_cache(self._folder)
        return self._warm(self._on_disk)

    def _floor(self) -> float:
        """Seconds of one query forward over an assembled cache and one copy of its bytes."""
        generator, prompt = self._in_ram, self._prompt
        start = prompt.layout.query_position
        device = generator.info.input_device
        with torch.no_grad(), fast_products(), generator.assemble(prompt) as cache:
            began = time.perf_counter()
            generator.model(
                input_ids=torch.tensor([prompt.query], device=device),
                position_ids=torch.arange(start, start + len(prompt.query), device=device)[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits.argmax().item()
            forward = time.perf_counter() - began
        return forward + self.kv_bytes / self._copy.bytes_per_second(self.kv_bytes)


class _TokenTimes(BaseStreamer):  # type: ignore[misc, unused-ignore]
    """Notes when the first new token came; the prompt itself comes before it."""

    def __init__(self) -> None:
        self._pieces = 0
        self.first = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._pieces += 1
        if self._pieces == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


@dataclass
class _Plain:
    """The figures of a run without a generator, in a result's form."""

    first: float
    whole: float
    count: int

    @property
    def timings(self) -> dict[str, float]:
        return {"first_token": self.first, "total": self.whole}

    @property
    def token_ids(self) -> list[int]:
        return [0] * self.count

    @property
    def cache(self) -> dict[str, int]:
        return {"bytes_loaded": 0}


class _CopyRate:
    """Speed of a plain copy between two reused buffers."""

    def __init__(self) -> None:
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def bytes_per_second(self, nbytes: int) -> float:
        size = min(nbytes, 1 << 28)
        if self._buffers is None or self._buffers[0].numel() != size:
            self._buffers = (
                torch.zeros(size, dtype=torch.uint8),
                torch.zeros(size, dtype=torch.uint8),
            )
        source, target = self._buffers
        start = time.perf_counter()
        target.copy_(source)
        return size / (time.perf_counter() - start)


def _drop_page_cache(folder: Path) -> None:
    """Ask the kernel to forget the pages of all files below ``folder``."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
