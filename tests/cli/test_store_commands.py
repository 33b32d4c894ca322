from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ape_integrations.chatbot import Library
from ape_integrations.cli import app, main
from ape_integrations.cli.options import parse_duration
from ape_integrations.errors import ConfigError, StoreError
from ape_integrations.store import DiskKVStore, KVStates
from tests.chatbot.conftest import Echo

COMMAND = [sys.executable, "-m", "ape_integrations.cli"]


def states(number: int) -> KVStates:
    return KVStates([torch.full((1, 4, 8), float(number))], [torch.ones(1, 4, 8)])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    store = DiskKVStore(tmp_path / "kv")
    for number in range(4):
        tag = "llama-8b" if number < 3 else "qwen-7b"
        store.put(str(number), states(number), tag=tag)
    store.get("0", states(0).spec)
    store.get("absent", states(0).spec)
    store.close()
    return tmp_path / "kv"


def run(*arguments: object, **kwargs: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **kwargs)


def run_json(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_stats_tells_what_is_stored(directory):
    figures = run_json("stats", "--cache-dir", directory)
    assert figures["entries"] == 4 and figures["hits"] == 1 and figures["misses"] == 1
    assert figures["hit_rate"] == 0.5
    assert figures["models"]["llama-8b"]["entries"] == 3
    assert figures["oldest"] <= figures["newest"] <= time.time()
    text = run("stats", "--cache-dir", directory).stdout
    assert "50.0% (1 hits, 1 misses)" in text and "qwen-7b" in text


def test_list_shows_the_most_recently_used_first(directory):
    rows = run_json("list", "--cache-dir", directory)
    assert [row["key"][-1] for row in rows] == ["0", "3", "2", "1"]
    assert rows[0]["hits"] == 1 and rows[0]["model"] == "llama-8b"
    assert len(run_json("list", "--cache-dir", directory, "--model", "llama*")) == 3
    assert len(run_json("list", "--cache-dir", directory, "--limit", "2")) == 2
    assert "last used" in run("list", "--cache-dir", directory).stdout


def test_verify_reports_and_repairs(directory):
    assert run_json("verify", "--cache-dir", directory)["clean"]
    file = next((directory / "entries").glob("??/*.kv"))
    file.write_bytes(b"damaged")
    result = run("verify", "--no-repair", "--cache-dir", directory)
    assert result.exit_code == 1 and "damaged entry" in result.stdout
    report = run_json("verify", "--cache-dir", directory)
    assert not report["clean"] and report["repaired"] and len(report["corrupted"]) == 1
    assert run_json("verify", "--cache-dir", directory)["checked"] == 3


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def leave_orphan(directory: Path) -> str:
    orphan = next((directory / "entries").glob("??/*.kv")).with_name("0" * 30 + ".kv")
    orphan.write_bytes(b"half")
    return str(orphan.relative_to(directory))


@pytest.mark.parametrize("damage", ["none", "garbage", "empty", "missing"])
def test_verify_without_repair_changes_nothing(directory, damage):
    orphan, index = leave_orphan(directory), directory / "cache.db"
    if damage == "missing":
        index.unlink()
    elif damage != "none":
        index.write_bytes(b"garbage" * 999 if damage == "garbage" else b"")
    before = contents(directory)
    result = run("verify", "--no-repair", "--json", "--cache-dir", directory)
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["clean"] and not report["repaired"]
    assert contents(directory) == before
    if damage == "none":
        assert report["checked"] == 4 and report["orphans"] == [orphan]
    else:
        assert report["index_errors"] and report["orphans"] == []


def test_verify_reports_what_opening_mended(directory):
    orphan = leave_orphan(directory)
    report = run_json("verify", "--cache-dir", directory)
    assert report["orphans"] == [orphan] and report["repaired"] and not report["clean"]
    (directory / "cache.db").write_bytes(b"garbage" * 999)
    report = run_json("verify", "--cache-dir", directory)
    assert report["checked"] == 4 and len(report["index_errors"]) == 1
    assert run_json("verify", "--cache-dir", directory)["clean"]


def test_prune_by_model_age_and_size(directory):
    assert run_json("prune", "--model", "qwen*", "--cache-dir", directory)["removed"] == 1
    assert run_json("prune", "--older-than", "1d", "--cache-dir", directory)["removed"] == 0
    with sqlite3.connect(directory / "cache.db") as database:
        database.execute("UPDATE Cache SET access_time = access_time - 90000 WHERE key LIKE '%/1'")
    left = run_json("prune", "--older-than", "1d", "--cache-dir", directory)
    assert left == {"removed": 1, "entries": 2, "bytes": left["bytes"]}
    assert run_json("prune", "--to-size", "1B", "--cache-dir", directory)["entries"] == 0


def test_prune_without_a_criterion_removes_nothing(directory):
    assert isinstance(run("prune", "--cache-dir", directory).exception, ConfigError)
    assert run_json("stats", "--cache-dir", directory)["entries"] == 4


def test_clear_asks_first(directory):
    refused = run("clear", "--cache-dir", directory, input="n\n")
    assert refused.exit_code == 1
    assert run_json("stats", "--cache-dir", directory)["entries"] == 4
    assert run_json("clear", "--yes", "--cache-dir", directory)["removed"] == 4


def test_clear_removes_the_text_that_chatbots_keep(directory, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "porto.txt").write_text("Porto lies on the Douro.")
    Library(Echo(), tmp_path / "files", directory=directory).read()
    own = directory / "passages" / "notes.txt"
    own.write_text("Porto.")
    assert len(list(own.parent.iterdir())) == 2
    run_json("prune", "--to-size", "1B", "--cache-dir", directory)
    assert len(list(own.parent.iterdir())) == 2
    result = run("clear", "--yes", "--cache-dir", directory)
    assert "Removed the passages" in result.stdout
    assert [path.name for path in own.parent.iterdir()] == ["notes.txt"]
    assert "Removed the passages" not in run("clear", "--yes", "--cache-dir", directory).stdout


def test_list_refuses_a_negative_limit(directory):
    result = run("list", "--limit", "-3", "--cache-dir", directory)
    assert result.exit_code == 2 and "--limit" in result.stderr


def test_looking_at_a_store_that_does_not_exist_creates_none(tmp_path):
    for command in ("stats", "list", "verify", "clear"):
        result = run(command, "--cache-dir", tmp_path / "none")
        assert isinstance(result.exception, StoreError)
    assert not (tmp_path / "none").exists()


def test_errors_are_messages_not_tracebacks(monkeypatch, tmp_path, capsys):
    arguments = ["ape-integrations", "stats", "--cache-dir", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("Error: There is no store in")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("90m", 5400), ("12h", 43200), ("1.5d", 129600), ("1w", 604800)],
)
def test_durations_are_read_as_people_write_them(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("bad", ["", "soon", "-1d", "1y", "d", "30"])
def test_bad_duration_is_a_clear_error(bad):
    with pytest.raises(ConfigError, match="not a duration"):
        parse_duration(bad)


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['ape-integrations', '--help']\n"
        "import ape_integrations.cli as cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'diskcache' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "stats" in result.stdout


def test_the_real_command_works(directory):
    result = subprocess.run(
        [*COMMAND, "stats", "--json", "--cache-dir", str(directory)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["entries"] == 4
