"""Several processes on one store, forked ones, and the end of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
        check=False,
    )


# Forks --------------------------------------------------------------------------------------------

_FORK = """
import os, sys, threading, time
import torch
from ape_integrations.core.generator import APEGenerator
from ape_integrations.store import DiskKVStore, MemoryKVStore, TieredKVStore
from tests.models import byte_tokenizer, tiny_model
from tests.core.test_generator import DOCUMENTS, PREFIX, QUERY

torch.set_num_threads(2)
store = TieredKVStore(MemoryKVStore(), DiskKVStore(sys.argv[1]))
generator = APEGenerator(tiny_model("llama"), byte_tokenizer(), store)
settings = {"max_new_tokens": 8, "do_sample": False}
expected = generator.generate(PREFIX, DOCUMENTS, QUERY, **settings).token_ids
# An operation that needs OpenMP's threads, which a child does not have.
torch.rand(1000, 1000).softmax(dim=-1)

if sys.argv[2] != "idle":
    reached, go_on = threading.Event(), threading.Event()
    generator.clear_assembled()

    def wait(*_):
        reached.set()
        go_on.wait(60)

    owner, name = {
        "generating": (generator._batches, "_run"),
        "encoding": (generator._encoder, "encode"),
        "assembling": (generator._source, "fill"),
    }[sys.argv[2]]
    if sys.argv[2] == "encoding":
        store.clear()
    real = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: (wait(), real(*a, **k))[1])
    thread = threading.Thread(
        target=lambda: generator.generate(PREFIX, DOCUMENTS, QUERY, **settings)
    )
    thread.start()
    assert reached.wait(60)
    setattr(owner, name, real)

child = os.fork()
if child == 0:
    torch.rand(1000, 1000).softmax(dim=-1)
    answer = generator.generate(PREFIX, DOCUMENTS, QUERY, **settings)
    os._exit(0 if answer.token_ids == expected else 3)
if sys.argv[2] != "idle":
    go_on.set()
deadline = time.monotonic() + 60
while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
    if time.monotonic() > deadline:
        os.kill(child, 9)
        sys.exit("the child hangs")
    time.sleep(0.05)
if sys.argv[2] != "idle":
    thread.join()
assert generator.generate(PREFIX, DOCUMENTS, QUERY, **settings).token_ids == expected
sys.exit(os.waitstatus_to_exitcode(ended[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parent", ["idle", "generating", "encoding", "assembling"])
def test_forked_process_answers_whatever_its_parent_was_doing(tmp_path: Path, parent: str) -> None:
    """Servers load a model once and fork their workers."""
    done = _run(_FORK, str(tmp_path / "store"), parent)
    assert done.returncode == 0, done.stderr


# The end ------------------------------------------------------------------------------------------

_OPEN_STREAM = """
import sys
from ape_integrations.core.generator import APEGenerator
from ape_integrations.store import MemoryKVStore
from tests.models import byte_tokenizer, tiny_model
from tests.core.test_generator import DOCUMENTS, PREFIX, QUERY

generator = APEGenerator(tiny_model("llama"), byte_tokenizer(), MemoryKVStore())
settings = {"max_new_tokens": 400, "min_new_tokens": 400, "do_sample": False}
stream = generator.stream(PREFIX, DOCUMENTS, QUERY, **settings)
next(stream)
if sys.argv[1] == "error":
    raise KeyError("of the user's own")
"""


@pytest.mark.parametrize(("way", "status"), [("end", 0), ("error", 1)])
def test_open_stream_does_not_abort_the_process(way: str, status: int) -> None:
    """A thread that the interpreter kills inside torch takes the process along."""
    done = _run(_OPEN_STREAM, way)
    assert done.returncode == status, done.stderr
