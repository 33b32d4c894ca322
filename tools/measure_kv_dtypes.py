"""Measure what storing KV states in fewer bytes costs: bytes per token, and error of the logits.

    python tools/measure_kv_dtypes.py [--model NAME_OR_PATH]

Contexts are encoded once, stored with every ``kv_dtype``, read back by a new generator, and the
logits at the query are compared with those from unquantised states.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

from ape_integrations.core.generator import APEGenerator
from ape_integrations.models import demo_model_path
from ape_integrations.store import DiskKVStore
from ape_integrations.store.quantization import KV_DTYPES

TEXTS = (
    "The lighthouse on the northern cape was built in 1874 by Ada Lindqvist. It is 31 metres high.",
    "The ferry to the island leaves at eight in the morning and at four in the afternoon. A ticket"
    " costs nine crowns.",
    "The museum keeps the diary of the first keeper, who lived there for forty years with a cat.",
    "In winter the cape is closed. Visitors need a permit from the harbour office in Brevik.",
)
QUERY = "Question: Who built the lighthouse on the northern cape? Answer:"


def logits_with(
    model: str, directory: Path, kv_dtype: str
) -> tuple[torch.Tensor, float, list[int]]:
    """Return query logits from stored states, bytes per token on disk, and the contexts' lengths.

    Parameters
    ----------
    model : str
        Name or path of a Hugging Face model.
    directory : Path
        An empty directory.
    kv_dtype : str
        How states are stored.
    """
    store = DiskKVStore(directory, kv_dtype=kv_dtype)
    first = APEGenerator.from_pretrained(model, store=store)
    encode = first.tokenizer.encode
    prefix, query = encode("\n\n", add_special_tokens=True), encode(QUERY, add_special_tokens=False)
    contexts = [encode(text, add_special_tokens=False) for text in TEXTS]
    first.query_logits(prefix, contexts, query)
    tokens = sum(map(len, contexts)) + len(prefix)
    # A generator of its own has nothing in memory but what it reads back.
    second = APEGenerator.from_pretrained(model, store=store)
    logits = second.query_logits(prefix, contexts, query)
    stats = store.stats()
    assert stats.hits >= len(contexts), "the second generator must have read the stored states"
    return logits.double(), stats.bytes / tokens, [len(ids) for ids in contexts]


def main() -> None:
    """Print one row per ``kv_dtype``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=None, help="default: the bundled model")
    model = parser.parse_args().model or demo_model_path()
    transformers.utils.logging.disable_progress_bar()
    exact: torch.Tensor | None = None
    print(
        "kv_dtype      bytes/token  max logit error  mean logit error  KL divergence  same argmax"
    )
    for kv_dtype in KV_DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            logits, per_token, _ = logits_with(model, Path(folder), kv_dtype)
        exact = logits if exact is None else exact
        error = (logits - exact).abs()
        expected = exact.log_softmax(-1)
        divergence = (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1).mean()
        same = (logits.argmax(-1) == exact.argmax(-1)).double().mean()
        print(
            f"{kv_dtype:12}  {per_token:11.0f}  {error.max():15.5f}  {error.mean():16.6f}"
            f"  {divergence:13.2e}  {same:11.1%}"
        )
    assert exact is not None
    print(f"logits have a standard deviation of {exact.std():.2f}")


if __name__ == "__main__":
    main()
