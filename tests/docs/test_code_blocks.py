"""Every code block of the documentation runs, page by page, or says why it does not."""

from __future__ import annotations

import ast
import builtins
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import re
import socket
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from ape_integrations.cli import app
from ape_integrations.core.break_even import BreakEven
from ape_integrations.models import demo_model_path

from .markdown import Block, blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if any(b.language in ("python", "shell") for b in blocks(page))]

#: Names that pages use for "your own model". In tests they are folders with the bundled one.
STAND_INS = ("Qwen/Qwen2.5-0.5B-Instruct",)

#: Commands that take too long, or wait for somebody: pages must mark them.
SLOW = ("bench", "eval", "tune", "chat")

_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be in an empty folder of a user without a network, with the examples beside it."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a code block asked the network")

    # How busy a machine is must not decide what a page prints.
    monkeypatch.setattr(BreakEven, "plan", lambda *_: "cached")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in STAND_INS:
        folder = tmp_path / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(demo_model_path())
    monkeypatch.chdir(tmp_path)
    with _frameworks_as_they_were():
        yield


@contextlib.contextmanager
def _frameworks_as_they_were() -> Iterator[None]:
    """Take back what pages set for a whole process."""
    from llama_index.core import Settings
    from llama_index.core.embeddings import MockEmbedding
    from llama_index.core.instrumentation import get_dispatcher

    root = get_dispatcher()
    handlers, before = list(root.event_handlers), (Settings._llm, Settings._embed_model)
    Settings.embed_model = MockEmbedding(8)
    yield
    root.event_handlers = [one for one in root.event_handlers if one in handlers]
    Settings._llm, Settings._embed_model = before


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_of_a_page_run_in_order(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    setup = Path(__file__).parent / "setup" / f"{page.stem.lower()}.py"
    if setup.exists():
        exec(compile(setup.read_text(encoding="utf-8"), setup, "exec"), names)
    for block in blocks(page):
        if block.language in CHECKS:
            CHECKS[block.language](block, names)


def test_blocks_that_do_not_run_give_a_reason() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert not block.not_run or len(block.not_run.split()) > 1, str(block)
        text = page.read_text(encoding="utf-8")
        assert text.count("not run:") == sum(bool(b.not_run) for b in blocks(page)), page.name


# Python ------------------------------------------------------------------------------------------


def _python(block: Block, names: dict[str, Any]) -> None:
    tree = ast.parse("\n" * (block.line - 1) + block.code, str(block.page))
    if block.not_run:
        _resolve(block, tree, names)
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(block.page), "exec"), names)
    _compare(block, printed.getvalue())


def _compare(block: Block, printed: str) -> None:
    if block.output is not None:
        same = doctest.OutputChecker().check_output(block.output, printed, _FLAGS)
        assert same, f"{block} prints\n{printed}\nand the page says\n{block.output}"


def _resolve(block: Block, tree: ast.Module, names: dict[str, Any]) -> None:
    """Import what a block imports, and look whether its names and arguments exist."""
    known = dict(names)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= _imported(node)
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.ctx != ast.Load()}
    stored = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in stored:
            assert node.id in known or hasattr(builtins, node.id), f"{block}: {node.id}?"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            _check_keywords(block, node, known.get(node.func.id))
    names |= {name: known.get(name) for name in {*known, *stored}}


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, Any]:
    """Return what an import statement binds; None where a foreign package is not installed."""
    found: dict[str, Any] = {}
    for alias in node.names:
        module = node.module if isinstance(node, ast.ImportFrom) else alias.name
        assert module is not None
        name = alias.asname or alias.name.partition(".")[0]
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            found[name] = None
        elif isinstance(node, ast.ImportFrom):
            found[name] = getattr(importlib.import_module(module), alias.name)
        else:
            found[name] = importlib.import_module(module)
    return found


def _check_keywords(block: Block, call: ast.Call, function: Any) -> None:
    if function is None or not getattr(function, "__module__", "").startswith("ape_integrations"):
        return
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for keyword in call.keywords:
        fits = open_ended or keyword.arg is None or keyword.arg in parameters
        assert fits, f"{block}: {ast.unparse(call.func)} has no argument {keyword.arg}"


# Commands ----------------------------------------------------------------------------------------


def _shell(block: Block, names: dict[str, Any]) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for command, *arguments in block.commands():
            assert command in COMMANDS, f"{block}: nothing checks {command!r}"
            COMMANDS[command](block, arguments)
    if not block.not_run:
        _compare(block, printed.getvalue())


def _ape_integrations(block: Block, arguments: Sequence[str]) -> None:
    if not block.not_run:
        assert not set(SLOW) & set(arguments[:1]), f"{block} needs <!-- not run: takes minutes -->"
        app(list(arguments), standalone_mode=False)
        return
    group: Any = typer.main.get_command(app)
    if arguments and not arguments[0].startswith("-"):
        command = group.commands[arguments[0]]
        context = command.make_context(arguments[0], list(arguments[1:]))
        if arguments[0] == "bench":
            from ape_integrations.benchmark.command import build_parser

            build_parser().parse_args(context.args)


def _make(block: Block, arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in arguments:
        assert "=" in target or re.search(rf"^{target}:", makefile, re.MULTILINE), f"{block}"


def _pip(block: Block, arguments: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for argument in arguments:
        extras = re.fullmatch(r"(?:ape-integrations|\.)\[(.+)\]", argument)
        for extra in extras[1].split(",") if extras else ():
            assert extra in project["optional-dependencies"], f"{block}: no extra {extra}"


def _run_python(block: Block, arguments: Sequence[str]) -> None:
    script = next((one for one in arguments if one.endswith(".py")), None)
    assert script is None or (ROOT / script).exists(), f"{block}: there is no {script}"


def _nothing(block: Block, arguments: Sequence[str]) -> None:
    """Take a command that has nothing of ours in it."""


CHECKS: dict[str, Callable[[Block, dict[str, Any]], None]] = {"python": _python, "shell": _shell}
COMMANDS: dict[str, Callable[[Block, Sequence[str]], None]] = {
    "ape-integrations": _ape_integrations,
    "make": _make,
    "pip": _pip,
    "python": _run_python,
    **dict.fromkeys(("git", "cd", "export", "python3", "source", "redis-server", "du"), _nothing),
}
