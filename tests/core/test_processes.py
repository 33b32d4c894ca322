"""Several processes on one store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_ASK = """
import json, sys
from ape_integrations.core.generator import APEGenerator
from ape_integrations.store import DiskKVStore
from tests.models import byte_tokenizer, tiny_model
from tests.core.test_generator import DOCUMENTS, PREFIX, QUERY

generator = APEGenerator(tiny_model("llama"), byte_tokenizer(), DiskKVStore(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
result = generator.generate(PREFIX, DOCUMENTS, QUERY, max_new_tokens=8, do_sample=False)
generator.close()
print(json.dumps([result.cache["hits"], result.cache["misses"], result.token_ids]))
"""


def _start(directory: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", _ASK, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )


def _ask_at_once(processes: list[subprocess.Popen[str]]) -> list[tuple[int, int, list[int]]]:
    answers = []
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        answers.append(tuple(json.loads(output)))
    return answers  # type: ignore[return-value]


def test_processes_share_a_store(tmp_path: Path) -> None:
    """Two at once encode each context once between them; a later one finds everything."""
    directory = tmp_path / "store"
    first, second = _ask_at_once([_start(directory), _start(directory)])
    assert first[0] + second[0] == 3
    assert first[1] + second[1] == 3
    [third] = _ask_at_once([_start(directory)])
    assert third[:2] == (3, 0)
    assert first[2] == second[2] == third[2]
