"""Pipelines: a stand-in that needs no model, and those of the examples with the bundled model."""

from __future__ import annotations

import importlib
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ape_integrations.chatbot import Library, Passage, Pipeline, Turn

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data"


class Echo(Pipeline):
    """Cuts files at blank lines; answers with the first passage, word by word."""

    framework = "Echo"

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.warmed: list[str] = []
        self.histories: list[list[str]] = []
        self.closed = threading.Event()
        self.may_warm = threading.Event()
        self.may_warm.set()
        self.endless = False
        self.before_reading: Callable[[Path], None] = lambda path: None

    @property
    def generator(self) -> Any:
        raise AssertionError("The stand-in has no model.")

    def read(self, path: Path) -> Iterator[tuple[str, str]]:
        self.reads.append(path.name)
        self.before_reading(path)
        for text in path.read_text().split("\n\n"):
            yield text, ""

    def index(self, passages: Sequence[Passage]) -> None:
        self.indexed = list(passages)

    def warm(self, passages: Sequence[Passage]) -> None:
        self.may_warm.wait(10)
        self.warmed += [passage.text for passage in passages]

    def answer(self, turn: Turn, history: Sequence[Turn]) -> Iterator[str]:
        self.histories.append([earlier.question for earlier in history])
        turn.passages = self.indexed[:2]
        turn.prompt = "prompt"
        try:
            while True:
                for word in turn.passages[0].text.split():
                    yield f"{word} "
                if not self.endless:
                    break
            turn.report = {
                "contexts": 2,
                "hits": 1,
                "misses": 1,
                "bytes_loaded": 1000,
                "first_token_seconds": 0.01,
            }
        finally:
            self.closed.set()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "files"
    path.mkdir()
    (path / "porto.txt").write_text("Porto lies on the Douro.\n\nPorto has tiles.")
    return path


@pytest.fixture
def open_library(folder: Path, tmp_path: Path) -> Callable[..., Library]:
    def start(pipeline: Pipeline, **options: Any) -> Library:
        library = Library(pipeline, folder, directory=tmp_path / "cache", **options)
        library.start()
        assert library.wait(10)
        return library

    return start


def example_pipeline(name: str, cache_dir: Path, *options: str) -> tuple[Pipeline, Namespace]:
    """Return the pipeline that an example builds, and its arguments."""
    caught: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        module = importlib.import_module(name)
        patch.setattr(module, "serve", lambda *found: caught.extend(found))
        patch.setattr(sys, "argv", [name, "--cache-dir", str(cache_dir), *options])
        module.main()
    return caught[0], caught[1]
