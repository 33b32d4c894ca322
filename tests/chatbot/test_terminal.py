from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ape_integrations.chatbot import Conversation, Library
from ape_integrations.chatbot.arguments import parse_arguments
from ape_integrations.chatbot.terminal import Terminal, show_progress
from ape_integrations.cli import app
from ape_integrations.errors import ConfigError
from tests.chatbot.conftest import DATA, Echo

Open = Callable[..., Library]


def run(echo: Echo, library: Library, *lines: str) -> str:
    """Return what a terminal prints while these lines are written to it."""
    written = iter(lines)

    def read_line() -> str:
        try:
            return next(written)
        except StopIteration:
            raise EOFError from None

    file = io.StringIO()
    console = Console(file=file, width=100)
    Terminal(Conversation(echo, library, 8), library, console, read_line).run()
    return file.getvalue()


def test_an_answer_has_a_line_of_figures_and_its_sources(echo: Echo, open_library: Open) -> None:
    shown = run(echo, open_library(echo), "Where?", "/sources", "/sources 2")
    assert "Porto lies on the Douro." in shown
    assert "first token after 10 ms, 1 of 2 passages from the cache, 1.0 kB read" in shown
    assert "2  porto.txt, passage 2: Porto has tiles." in shown
    assert "│ Porto has tiles." in shown


def test_quit_ends_the_program(echo: Echo, open_library: Open) -> None:
    assert "Porto lies" not in run(echo, open_library(echo), "/quit", "Where?")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "Write a question first."),
        ("/nonsense", "There is no command /nonsense."),
        ("/sources", "no answer with sources yet"),
        ("/add", "Name a file"),
        ("/files", "porto.txt"),
        ("/compare", "Comparison with sequential prefill is on."),
    ],
)
def test_every_line_gets_a_reply(echo: Echo, open_library: Open, line: str, said: str) -> None:
    assert said in run(echo, open_library(echo), line)


def test_a_source_that_does_not_exist_is_said(echo: Echo, open_library: Open) -> None:
    assert "number from 1 to 2" in run(echo, open_library(echo), "Where?", "/sources 9")


def test_a_file_can_be_added(echo: Echo, open_library: Open, tmp_path: Path) -> None:
    added = tmp_path / "ghent.txt"
    added.write_text("Ghent lies on the Lys.")
    shown = run(echo, open_library(echo), f"/add {added}", "/files")
    assert "ghent.txt: 1 passage." in shown


@pytest.mark.parametrize(
    ("argument", "said"),
    [("", "Name a file behind /add."), ("nowhere.txt", "There is no file nowhere.txt.")],
)
def test_a_file_that_is_not_there_is_said(
    echo: Echo, open_library: Open, argument: str, said: str
) -> None:
    assert said in run(echo, open_library(echo), f"/add {argument}")


def test_documents_cannot_steer_the_terminal(echo: Echo, open_library: Open, folder: Path) -> None:
    (folder / "porto.txt").write_text("\x1b[2J[bold]Porto[/bold] \x07lies.")
    shown = run(echo, open_library(echo), "Where?", "/sources 1")
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[bold]Porto[/bold]" in shown


def test_ctrl_c_stops_the_answer_and_not_the_program(echo: Echo, open_library: Open) -> None:
    echo.endless = True
    library = open_library(echo)
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell runs the tests behind it
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    shown = run(echo, library, "Where?", "/files")
    assert "Stopped." in shown
    assert shown.rstrip().endswith("porto.txt")
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_is_shown_until_all_is_warm(echo: Echo, folder: Path, tmp_path: Path) -> None:
    library = Library(echo, folder, directory=tmp_path / "cache")
    echo.may_warm.clear()
    threading.Timer(0.4, echo.may_warm.set).start()
    file = io.StringIO()
    show_progress(library, Console(file=file, force_terminal=True, width=80))
    assert "Warming" in file.getvalue()
    assert library.status.phase == "ready"


def test_the_command_answers_from_a_folder(tmp_path: Path) -> None:
    lines = "Where is Argent Optics based?\n/sources 1\n/compare\n/quit\n"
    command = ["chat", str(DATA), "--cache-dir", str(tmp_path)]
    result = CliRunner().invoke(app, command, input=lines)
    assert result.exit_code == 0, result.output
    assert "Geneva" in result.output
    assert "4 of 4 passages from the cache" in result.output
    assert "sequentially after" in result.output


def test_the_command_refuses_an_empty_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(tmp_path), "--cache-dir", str(tmp_path / "c")])
    assert isinstance(result.exception, ConfigError)
    assert "nothing to read" in str(result.exception)


@pytest.mark.parametrize(
    "wrong", [["--top-k", "0"], ["--top-k", "-1"], ["--chunk-size", "x"], ["--port", "99999"]]
)
def test_impossible_values_are_refused(
    wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["chatbot", *wrong])
    with pytest.raises(SystemExit):
        parse_arguments("A chatbot.", Path("."))
    assert f"argument {wrong[0]}: '{wrong[1]}' is no" in capsys.readouterr().err
