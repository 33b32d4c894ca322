from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ape_integrations.chatbot import Library
from ape_integrations.chatbot.library import forget_passages
from ape_integrations.errors import ConfigError
from tests.chatbot.conftest import Echo

Open = Callable[..., Library]


def texts(library: Library) -> list[str]:
    return [passage.text for passage in library.passages]


def test_a_folder_is_read_indexed_and_warmed(echo: Echo, open_library: Open) -> None:
    library = open_library(echo)
    assert texts(library) == ["Porto lies on the Douro.", "Porto has tiles."]
    assert echo.warmed == texts(library)
    assert [passage.title for passage in library.passages] == ["porto.txt", "porto.txt, passage 2"]


def test_a_second_start_reads_only_what_has_changed(
    echo: Echo, open_library: Open, folder: Path
) -> None:
    (folder / "ghent.txt").write_text("Ghent lies on the Lys.")
    first = open_library(echo)
    (folder / "ghent.txt").write_text("Ghent lies on the Scheldt and the Lys.")
    second = Echo()
    library = open_library(second)
    assert second.reads == ["ghent.txt"]
    assert texts(library)[0] == "Ghent lies on the Scheldt and the Lys."
    assert texts(library)[1:] == texts(first)[1:]


def test_a_file_that_is_gone_is_forgotten(echo: Echo, open_library: Open, folder: Path) -> None:
    (folder / "ghent.txt").write_text("Ghent lies on the Lys.")
    open_library(echo)
    (folder / "ghent.txt").unlink()
    assert open_library(Echo()).files == ["porto.txt"]


def test_a_damaged_index_is_read_again(echo: Echo, open_library: Open, tmp_path: Path) -> None:
    open_library(echo)
    (kept,) = (tmp_path / "cache" / "passages").iterdir()
    for damage in ("{", "[]", '{"porto.txt": {"size": 1}}'):
        kept.write_text(damage)
        second = Echo()
        assert texts(open_library(second)) == echo.warmed
        assert second.reads == ["porto.txt"]


def test_an_empty_folder_says_what_belongs_there(
    echo: Echo, open_library: Open, folder: Path
) -> None:
    (folder / "porto.txt").unlink()
    library = open_library(echo)
    assert library.passages == []
    assert "nothing to read" in library.why_empty()
    assert "pdf" in library.why_empty()


def test_a_missing_folder_is_refused(echo: Echo, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no folder"):
        Library(echo, tmp_path / "nowhere", directory=tmp_path)


def test_a_200_mb_file_is_left_out_unread(echo: Echo, open_library: Open, folder: Path) -> None:
    with (folder / "dump.txt").open("wb") as file:
        file.truncate(200_000_000)  # sparse: it takes no space
    library = open_library(echo)
    assert echo.reads == ["porto.txt"]
    (problem,) = library.problems
    assert problem.startswith("dump.txt: 200.0 MB is over the limit of 50.0 MB")
    assert "--max-file-size" in problem


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("picture.txt", b"\x89PNG\r\n\x1a\n\0\0", "binary"),
        ("latin.md", "Köln".encode("latin-1"), "UTF-8"),
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n ", "no text was found"),
        ("report.pdf", b"<html>not found</html>", "no PDF"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_left_out(
    echo: Echo, open_library: Open, folder: Path, name: str, content: bytes, said: str
) -> None:
    (folder / name).write_bytes(content)
    library = open_library(echo)
    assert library.files == ["porto.txt"]
    assert library.problems[0].startswith(f"{name}: ")
    assert said in library.problems[0]


def test_a_file_that_vanishes_while_it_is_read_is_left_out(
    echo: Echo, open_library: Open, folder: Path
) -> None:
    (folder / "gone.txt").write_text("Here for a moment.")
    echo.before_reading = lambda path: path.name == "gone.txt" and os.unlink(path)  # type: ignore[assignment,func-returns-value]
    library = open_library(echo)
    assert library.files == ["porto.txt"]
    assert "gone.txt: the file has vanished" in library.problems[0]


def test_a_reader_that_fails_costs_one_file(echo: Echo, open_library: Open, folder: Path) -> None:
    (folder / "odd.txt").write_text("Odd.")

    def fail(path: Path) -> None:
        if path.name == "odd.txt":
            raise RuntimeError("cannot parse")

    echo.before_reading = fail
    library = open_library(echo)
    assert library.files == ["porto.txt"]
    assert library.problems == ["odd.txt: cannot be read (cannot parse)."]


def test_hidden_files_and_other_kinds_are_not_read(
    echo: Echo, open_library: Open, folder: Path
) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "notes.txt").write_text("Hidden.")
    (folder / "table.csv").write_text("a,b")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "ghent.md").write_text("Ghent lies on the Lys.")
    library = open_library(echo)
    assert sorted(library.files) == ["deeper/ghent.md", "porto.txt"]
    assert library.left_out == 1


def test_an_added_file_is_found_at_once_and_a_later_one_of_its_name_replaces_it(
    echo: Echo, open_library: Open, tmp_path: Path
) -> None:
    library = open_library(echo)
    added = tmp_path / "upload.txt"
    for text in ("Verona lies on the Adige.", "Verona has an arena."):
        added.write_text(text)
        assert library.add(added, "verona.txt") == 1
        assert [passage.text for passage in echo.indexed][2:] == [text]
    assert library.wait(10)
    assert echo.warmed[-1] == "Verona has an arena."


def test_an_added_file_that_cannot_be_read_is_refused(
    echo: Echo, open_library: Open, tmp_path: Path
) -> None:
    library = open_library(echo)
    added = tmp_path / "picture.png"
    added.write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match="kinds that are read"):
        library.add(added, "picture.png")
    assert library.files == ["porto.txt"]


def test_questions_can_be_asked_while_warming_goes_on(
    echo: Echo, folder: Path, tmp_path: Path
) -> None:
    echo.may_warm.clear()
    library = Library(echo, folder, directory=tmp_path / "cache")
    library.start()
    assert not library.wait(0.2)
    assert library.status.phase == "warming"
    assert library.status.total == 2
    assert library.passages
    echo.may_warm.set()
    assert library.wait(10)
    assert library.status.fraction == 1


def test_warming_waits_while_an_answer_is_generated(
    echo: Echo, folder: Path, tmp_path: Path
) -> None:
    library = Library(echo, folder, directory=tmp_path / "cache")
    with library.answering():
        library.start()
        assert not library.wait(0.2)
        assert echo.warmed == []
    assert library.wait(10)
    assert len(echo.warmed) == 2


def test_an_index_that_cannot_be_written_costs_the_next_start_only(
    echo: Echo, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "passages").write_text("in the way")
    library = Library(echo, folder, directory=tmp_path / "cache")
    library.start()
    assert library.wait(10)
    assert len(library.passages) == 2


def test_no_thread_is_left(echo: Echo, open_library: Open) -> None:
    open_library(echo)
    assert not [t for t in threading.enumerate() if t.name == "chat-library"]


def test_forgotten_passages_are_read_again(echo: Echo, open_library: Open, tmp_path: Path) -> None:
    open_library(echo)
    folder = tmp_path / "cache" / "passages"
    assert "Douro" in next(folder.iterdir()).read_text()
    (folder / "tmp_killed0.part").write_text("Porto")
    assert forget_passages(tmp_path / "cache") == 1
    assert list(folder.iterdir()) == []
    assert forget_passages(tmp_path / "cache") == 0
    assert forget_passages(tmp_path / "nowhere") == 0
    second = Echo()
    open_library(second)
    assert second.reads == ["porto.txt"]


def test_a_home_directory_is_that_of_the_store(
    echo: Echo, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Library(echo, folder, directory=Path("~/kv")).read()
    assert len(list((tmp_path / "kv" / "passages").iterdir())) == 1
