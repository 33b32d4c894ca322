"""``bench`` and ``warm``, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llama_index.core import SimpleDirectoryReader
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.schema import MetadataMode
from typer.testing import CliRunner, Result

from ape_integrations import APELLM
from ape_integrations.benchmark import command
from ape_integrations.benchmark.runner import MODES
from ape_integrations.cli import app
from ape_integrations.errors import ConfigError

SMALL = ["bench", "--shape", "tiny", "--context-tokens", "32", "--new-tokens", "3", "--json"]


def _run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_bench_reports_every_mode_side_by_side() -> None:
    result = _run(*SMALL, "--contexts", "2", "4", "--repetitions", "2")
    report = json.loads(result.stdout)
    assert [r["workload"]["contexts"] for r in report["results"]] == [2, 4]
    for measured in report["results"]:
        assert list(measured["modes"]) == list(MODES)
        for mode, figures in measured["modes"].items():
            assert figures["repetitions"] == 2
            assert figures["first_token"] > 0
            if mode.startswith("ape disk"):
                assert figures["bytes_loaded"] >= measured["kv_bytes"]
        assert measured["ratios"]["ape ram"]["first_token"] > 0


@pytest.mark.parametrize("arguments", [["--contexts", "0"], ["--shape", "huge"], ["--what"]])
def test_bench_refuses_bad_arguments(arguments: list[str]) -> None:
    result = _run(*SMALL, *arguments)
    assert result.exit_code == 2
    assert "error" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "no/folder/plot.png"], "Cannot write into no/folder"),
        (["--plot", "plot.xyz"], "must end in one of .png"),
        (["--plot", "plot.xyz", "--growth"], "must end in one of .png"),
        (["--directory", "no/folder"], "Cannot write into no/folder"),
        (["--device", "abacus"], "--device 'abacus' cannot be used here"),
    ],
)
def test_bench_refuses_what_cannot_be_used_before_it_measures(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_compare", "_grow"):
        monkeypatch.setattr(command, name, lambda _: pytest.fail("It measures already."))
    result = _run(*SMALL, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_bench_names_a_model_that_is_not_there() -> None:
    result = _run("bench", "--model", "./nowhere", "--contexts", "1")
    assert result.exit_code == 2
    assert "Cannot load './nowhere'" in " ".join(result.stderr.split())


def test_warm_encodes_files_once(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"Document {number} is about welding.")
    arguments = ["warm", str(texts), "--cache-dir", str(tmp_path / "store"), "--json"]
    first = json.loads(_run(*arguments).stdout)
    assert first["nodes"] == 3
    assert first["entries"] >= first["entries_before"] + 3
    again = json.loads(_run(*arguments).stdout)
    assert again["entries"] == again["entries_before"] == first["entries"]


@pytest.mark.parametrize("given", [["texts"], ["texts/0.txt", "./texts/1.txt", "texts/2.txt"]])
def test_warm_reads_files_as_a_pipeline_over_their_folder_does(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(3):
        Path("texts", f"{number}.txt").write_text(f"Document {number} is about welding.")
    _run("warm", *given, "--cache-dir", "store")
    nodes = SentenceSplitter().get_nodes_from_documents(SimpleDirectoryReader("texts").load_data())
    texts = [node.get_content(MetadataMode.LLM) for node in nodes]
    llm = APELLM(cache_dir="store")
    llm.register_contexts(texts)
    prompt = llm.render_template(
        DEFAULT_TEXT_QA_PROMPT_SEL, context_str="\n\n".join(texts), query_str="What is welded?"
    )
    answer = llm.generator.generate_prompt(prompt, max_new_tokens=1)
    assert (answer.cache["hits"], answer.cache["misses"]) == (3, 0)


def test_warm_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        _run("warm", str(tmp_path / "nowhere"))


def test_warm_refuses_what_holds_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"No file in .*empty can be read"):
        _run("warm", str(tmp_path / "empty"))
    (tmp_path / "bad.pdf").write_bytes(b"no PDF")
    with pytest.raises(ConfigError, match=r"No file in .*bad.pdf can be read"):
        _run("warm", str(tmp_path / "bad.pdf"))


def test_warm_names_a_file_that_cannot_be_read_and_takes_the_others(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "bad.pdf").write_bytes(b"no PDF")
    (texts / "good.txt").write_text("Ada is a welder.")
    result = _run("warm", str(texts), "--cache-dir", str(tmp_path / "store"), "--json")
    assert json.loads(result.stdout)["nodes"] == 1
    assert "bad.pdf cannot be read" in result.stderr


def test_warm_refuses_nodes_without_room_for_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ada is a welder.")
    with pytest.raises(ConfigError, match="--chunk-size 1 is too small"):
        _run("warm", str(tmp_path / "a.txt"), "--chunk-size", "1", "--chunk-overlap", "0")
