"""Write docs/models.md from what the tests of model families actually ran.

Usage: ``python tools/support_matrix.py`` runs ``tests/families`` and rewrites the page;
``--results FILE`` takes the JUnit file of an earlier run instead (``pytest tests/families
-m "" -o junit_family=xunit1 --junitxml FILE``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"

#: Column of the matrix -> the tests behind it.
COLUMNS = {
    "contexts": ("test_contexts_equal_brute_force", "test_text_only_contexts_equal_brute_force"),
    "decoding": ("test_decoding_equals_brute_force", "test_text_only_decoding_equals_brute_force"),
    "drafts": ("test_drafted_tokens_are_verified_exactly",),
    "batch": ("test_batch_gives_each_query_its_own_answer",),
    "sequential": (
        "test_one_context_equals_sequential_generation",
        "test_text_only_equals_sequential_generation",
    ),
    "bf16": (
        "test_one_context_equals_sequential_in_bf16",
        "test_text_only_equals_sequential_in_bf16",
    ),
    "compiled": ("test_compiled_decoding_equals_brute_force",),
}


@dataclass
class Row:
    """What the tests found of one family: column -> passed."""

    passed: dict[str, bool] = field(default_factory=dict)
    reason: str = ""


@dataclass
class Results:
    """Rows by family, and how the other tests went: name -> (passed, failed, skipped)."""

    served: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    refused: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    other: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))


def read(junit: Path) -> Results:
    """Return what a run of the tests recorded."""
    results = Results()
    for case in ElementTree.parse(junit).iter("testcase"):
        properties = {p.get("name"): p.get("value", "") for p in case.iter("property")}
        bad = case.find("failure") is not None or case.find("error") is not None
        name = str(case.get("name")).split("[")[0]
        if "refused" in properties:
            row = results.refused[properties["refused"]]
            row.passed["refused"] = not bad
            row.reason = properties.get("reason", "")
        elif "family" in properties:
            column = next((c for c, tests in COLUMNS.items() if name in tests), None)
            if column:
                results.served[properties["family"]].passed[column] = not bad
        state = 2 if case.find("skipped") is not None else int(bad)
        results.other[name][state] += 1
    return results


def render(results: Results) -> str:
    """Return the page."""
    sys.path.insert(0, str(ROOT))
    from tests.families.registry import REFUSED, SERVED
    from tests.families.vision_language import REFUSED as VISION_REFUSED
    from tests.families.vision_language import SERVED as VISION

    served = {title: (family.config, family.special) for title, family in SERVED.items()}
    vision = {title: (entry[0], entry[3]) for title, entry in VISION.items()}
    refused = {title: family.config for title, family in REFUSED.items()}
    refused |= {title: entry[0] for title, entry in VISION_REFUSED.items()}
    lines = [_INTRODUCTION.format(count=len(served) + len(vision), versions=_versions())]
    lines += ["## Served", "", *_matrix(served, results)]
    lines += ["", "## Served with text alone: vision-language models", "", _VISION, ""]
    lines += _matrix(vision, results)
    lines += ["", "## Refused", "", _REFUSED, "", "| Family | Class | Reason |", "|---|---|---|"]
    for title, name in refused.items():
        row = results.refused.get(title, Row())
        reason = row.reason if row.passed.get("refused") else "**not tested**"
        lines.append(f"| {title} | `{name}` | {_clause(reason)} |")
    lines += ["", *_other(results), _LIMITS]
    return "\n".join(lines).rstrip() + "\n"


def _matrix(families: dict[str, tuple[str, str]], results: Results) -> list[str]:
    rows = {title: results.served.get(title, Row()).passed for title in families}
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    lines = [f"| Family | Class | Special | {' | '.join(columns)} |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for title, (name, special) in families.items():
        marks = (_MARKS[rows[title].get(column)] for column in columns)
        lines.append(f"| {title} | `{name}` | {special} | {' | '.join(marks)} |")
    return lines


_MARKS = {True: "yes", False: "**no**", None: "**not tested**"}


def _clause(reason: str) -> str:
    """Return a refusal's reason without the class name at its start and the advice at its end."""
    return reason.split(" ", 1)[-1].rstrip(".").replace("|", "\\|")


def _other(results: Results) -> list[str]:
    lines = ["## Positions, weights, tokenizers", "", "| Claim | Cases |", "|---|---|"]
    columns = {test for tests in COLUMNS.values() for test in tests}
    for name, (passed, failed, skipped) in sorted(results.other.items()):
        if name in columns or "refused_with_reason" in name or name.startswith("test_page_"):
            continue
        counts = [f"{passed} passed"] if passed else []
        counts += [f"**{failed} failed**"] if failed else []
        counts += [f"{skipped} skipped (package not installed)"] if skipped else []
        claim = name.removeprefix("test_").replace("_", " ")
        lines.append(f"| {claim[0].upper()}{claim[1:]} | {', '.join(counts)} |")
    return [*lines, ""]


def _versions() -> str:
    found = []
    for package in ("torch", "transformers", "tokenizers", "peft", "accelerate", *_QUANTISERS):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


_QUANTISERS = ("torchao", "bitsandbytes")

_INTRODUCTION = """# Models

<!-- Written by `python tools/support_matrix.py` from what the tests ran. Edit that, not this. -->

Whether a model is served is decided by what it does, not by its name: its layers must keep
key/value states, hand them to transformers' attention interface, and mask them by position (every
earlier token, or those within a sliding window). When a model is attached, the package reads the
rules behind its masks and compares a dozen tokens behind a cached context with the model's own
logits; a model that differs is refused with `UnsupportedModelError` and left as it was. A family
that is not listed here is held to the same checks.

The tables say what was tested, with tiny random models of {count} kinds on CPU
({versions}):

- **contexts**: several contexts, T = 0.8, S = 1.2, contexts longer than the sliding window: logits
  equal an independent float64 brute force within 1e-4;
- **decoding**: ten decoded tokens and their logits equal the brute force, past the sliding window;
- **drafts**: guesses copied from the contexts, verified several at a time, change no token;
- **batch**: queries of unequal length answered together get what each gets alone;
- **sequential**: one context with T = S = 1 gives the model's own tokens in fp32, and its logits;
- **bf16**: one context in bf16 is no further from fp32 than 1.5 times the model's own bf16;
- **compiled**: "decoding" again, in a model whose `compile()` was called.
"""

_VISION = """Load them with `APEGenerator.from_pretrained` or pass the loaded model: prompts are
text, the vision tower keeps its own attention and is never called."""

_REFUSED = """Each is refused when it is attached, before any text is read, with the reason and what
to use instead; the model stays as it was."""

_LIMITS = """## What to know

- **RoPE scaling.** `linear`, `yarn`, `llama3` and `proportional` use fixed frequencies. `dynamic`
  and `longrope` (Phi-3 128k, Phi-4-mini) change all frequencies once a sequence is long, so stored
  keys would not fit later queries; such models are served up to
  `original_max_position_embeddings` (`longrope`) or `max_position_embeddings - 1` (`dynamic`)
  positions, and longer prompts raise `ContextWindowError`. Contexts share their positions, so this
  limits prefix + longest context + query + answer, not the contexts together.
- **Adapters.** LoRA and other adapters that change weights are served, active or merged; each state
  of the adapters has entries of its own. Prompt tuning and prefix tuning are refused.
- **Quantised weights.** int8 of torchao and 4-bit and 8-bit of bitsandbytes are tested where those
  packages are installed. KV states have the dtype of the model's computation.
- **Other devices.** States stay on the device of their layer, be it one accelerator or several. All
  families are tested on a simulated device, whose tensors cannot be mixed with the CPU's, and all
  but GPT-2, GPT-BigCode, GPT-NeoX and OPT on two as well; CUDA's kernels are simulated there, MPS
  has none of its own. No real accelerator was at hand. Offloading to CPU and disk (accelerate) is
  tested.
- **`torch.compile`.** A model whose `compile()` was called, or whose `forward` was replaced by
  `torch.compile(model.forward)`, runs compiled, before or after it was handed over; APE's own
  attention stays one operation per layer, and one graph serves all contexts. Nothing breaks the
  graph but the routing of mixtures of experts. The first questions wait for the compiler. What
  `torch.compile(model)` returns is served too, by the model inside, uncompiled: its `generate()`
  does the same in transformers. On the CPU it brought nothing
  ([benchmarks](benchmarks.md#torchcompile)); CUDA was not tried.
- **Mixture of experts.** Tokens are routed alike up to rounding; where two experts are almost
  equally likely, a different batch may choose the other one, as it may in any batch.
"""


def main() -> None:
    """Run the tests, or read their results, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="JUnit file of an earlier run")
    results = parser.parse_args().results
    with tempfile.TemporaryDirectory() as folder:
        if results is None:
            results = Path(folder) / "results.xml"
            command = [sys.executable, "-m", "pytest", "-q", "tests/families", "-m", ""]
            # The page that is about to be written is not among the evidence for it.
            command += ["--ignore=tests/families/test_support_matrix.py"]
            command += ["-o", "junit_family=xunit1", f"--junitxml={results}"]
            subprocess.run(command, cwd=ROOT, check=False)
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(render(read(results)), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
