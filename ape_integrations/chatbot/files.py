"""Files that a chatbot can read, and the passages that they are cut into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ape_integrations.errors import ConfigError
from ape_integrations.store.sizes import format_size

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm")
SUFFIXES = (*TEXT_SUFFIXES, ".pdf")

#: Questions to try, beside the files that they are about.
EXAMPLES_FILE = "questions.json"

#: A larger file is a dump or a mistake far more often than something to ask questions about.
MAX_FILE_BYTES = 50_000_000

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Passage:
    """A piece of a file that is retrieved, cached and shown as one.

    Parameters
    ----------
    text : str
        The text as it stands in prompts.
    source : str
        The file's name, relative to the folder.
    number : int
        Which passage of its file, from 1.
    page : str
        The page's label, where the file has pages.
    """

    text: str
    source: str
    number: int = 1
    page: str = ""

    @property
    def title(self) -> str:
        """Where the passage stands, for people."""
        if self.page:
            return f"{self.source}, page {self.page}"
        return self.source if self.number == 1 else f"{self.source}, passage {self.number}"


def find_files(folder: Path) -> Iterator[Path]:
    """Yield the visible files of a folder and of the folders in it, sorted.

    Raises
    ------
    ConfigError
        There is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Name one that holds your files.")
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and not path.is_dir():
            yield path


def check_readable(path: Path, name: str, max_bytes: int = MAX_FILE_BYTES) -> None:
    """Refuse a file that no reader should be given.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        What people call it.
    max_bytes : int
        The largest file that is read.

    Raises
    ------
    ConfigError
        Its kind is not known, it is too large, or it is not what its name says.
    OSError
        It cannot be opened.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise ConfigError(f"{name}: not one of the kinds that are read ({known}).")
    size = path.stat().st_size
    if size > max_bytes:
        raise ConfigError(
            f"{name}: {format_size(size)} is over the limit of {format_size(max_bytes)} a file. "
            "Split it, or raise the limit with --max-file-size."
        )
    if size == 0:
        raise ConfigError(f"{name}: the file is empty.")
    if suffix == ".pdf":
        with path.open("rb") as file:
            if b"%PDF-" not in file.read(1024):
                raise ConfigError(f"{name}: this is no PDF, whatever its name says.")
    elif not _is_text(path):
        raise ConfigError(f"{name}: binary, or text that is not UTF-8. Save it as UTF-8.")


def _is_text(path: Path) -> bool:
    """Tell whether a file is UTF-8 without the characters that only binary files have."""
    try:
        with path.open(encoding="utf-8") as file:
            while block := file.read(_BLOCK):
                if "\0" in block:
                    return False
    except UnicodeDecodeError:
        return False
    return True
