"""The files that a chatbot answers from: read, indexed, warmed, kept for the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ape_integrations.chatbot.files import (
    EXAMPLES_FILE,
    MAX_FILE_BYTES,
    SUFFIXES,
    Passage,
    check_readable,
    find_files,
)
from ape_integrations.chatbot.pipeline import Pipeline
from ape_integrations.errors import ConfigError, StoreError
from ape_integrations.store.directory import default_directory

logger = logging.getLogger(__name__)

_FORMAT = 1

#: Where passages are kept in a store's directory, and the files there, drafts included.
_FOLDER = "passages"
_KEPT = re.compile(r"[0-9a-f]{32}\.json|tmp\w+\.part")

#: Passages that are encoded before a waiting question gets its turn.
_AT_ONCE = 8

Phase = Literal["reading", "warming", "ready"]


@dataclass(frozen=True)
class Status:
    """How far a library is.

    Parameters
    ----------
    phase : str
        Questions can be asked from "warming" on.
    done, total : int
        Files read, or passages warmed.
    detail : str
        The file that is being read.
    """

    phase: Phase = "reading"
    done: int = 0
    total: int = 0
    detail: str = ""

    @property
    def fraction(self) -> float:
        """What is done of the phase, from 0 to 1."""
        return self.done / self.total if self.total else float(self.phase == "ready")


@dataclass
class _File:
    """A file as it was read: its stamp says whether it has changed since."""

    stamp: tuple[int, int]
    passages: list[Passage] = field(default_factory=list)


class Library:
    """The passages of a folder's files, and of files added later. Thread-safe.

    The text that was read is kept in clear in the store's directory, for its owner only: the next
    start reads what has changed. :func:`forget_passages` removes it.

    Parameters
    ----------
    pipeline : Pipeline
        Reads, indexes and warms.
    folder : Path
        The user's files.
    directory : Path, optional
        The store's directory. None: the user's cache.
    key : str
        What else decides how files are cut, such as the size of passages.
    max_file_bytes : int
        Larger files are left out, with a message.

    Attributes
    ----------
    passages : list of Passage
        What answers are found in.
    left_out : int
        Files of kinds that are not read.
    status : Status
        How far reading and warming are.

    Raises
    ------
    ConfigError
        There is no such folder.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        *,
        directory: Path | None = None,
        key: str = "",
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._pipeline = pipeline
        self.folder = folder.expanduser().resolve()
        if not self.folder.is_dir():
            raise ConfigError(f"There is no folder {folder}. Name one that holds your files.")
        self._max_file_bytes = max_file_bytes
        identity = json.dumps([_FORMAT, str(self.folder), pipeline.framework, key])
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        store = (directory or default_directory()).expanduser()
        self._index_file = store / _FOLDER / f"{name}.json"
        self._files: dict[str, _File] = {}
        self._problems: dict[str, str] = {}
        self._cold: deque[Passage] = deque()  # passages that are not warm yet
        self._answering = 0
        self._lock = threading.Lock()  # the files
        self._quiet = threading.Condition()  # no answer is being generated
        self._thread: threading.Thread | None = None
        self.passages: list[Passage] = []
        self.left_out = 0
        self.status = Status()

    # What is there ------------------------------------------------------------------------------

    @property
    def files(self) -> list[str]:
        """Names of the files that were read."""
        with self._lock:
            return list(self._files)

    @property
    def problems(self) -> list[str]:
        """Files that could not be read, one sentence each."""
        with self._lock:
            return list(self._problems.values())

    def why_empty(self) -> str:
        """Say why no question can be answered."""
        if self.status.phase == "reading":
            return "The files are still being read."
        kinds = ", ".join(suffix[1:] for suffix in SUFFIXES)
        why = " ".join(self.problems)
        return f"There is nothing to read in {self.folder} ({kinds}). {why}".strip()

    # Reading ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Read, index and warm in the background."""
        self._thread = threading.Thread(target=self._start, name="chat-library", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything is warm; return whether it is."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self.status.phase == "ready"

    def _start(self) -> None:
        try:
            self.read()
        except Exception:
            logger.exception("Reading %s failed", self.folder)
        self.warm()

    def read(self) -> None:
        """Read the folder's files, those that have changed since the last start, and index them."""
        kept = self._load()
        found = list(find_files(self.folder))
        others = [path for path in found if path.suffix.lower() not in SUFFIXES]
        self.left_out = sum(path.name != EXAMPLES_FILE for path in others)
        found = [path for path in found if path.suffix.lower() in SUFFIXES]
        files: dict[str, _File] = {}
        for number, path in enumerate(found):
            name = str(path.relative_to(self.folder))
            self.status = Status("reading", number, len(found), name)
            try:
                files[name] = self._read_file(path, name, kept.get(name))
            except ConfigError as error:
                self._problems[name] = str(error)
        with self._lock:
            # What was added meanwhile stays.
            self._files = {**files, **self._files}
            self._reindex()
            self._cold.extend(passage for file in files.values() for passage in file.passages)
        self._save(files, kept)

    def add(self, path: Path, name: str) -> int:
        """Read one more file for as long as the program runs; return its number of passages.

        A file of the same name is replaced.

        Raises
        ------
        ConfigError
            It cannot be read; the message says why.
        """
        file = self._read_file(path, name, None)
        with self._lock:
            self._files[name] = file
            self._problems.pop(name, None)
            self._reindex()
            # Before the rest of a large folder, because it is about to be asked for.
            self._cold.extendleft(reversed(file.passages))
        if self.status.phase == "ready":
            self._thread = threading.Thread(target=self.warm, name="chat-library", daemon=True)
            self._thread.start()
        return len(file.passages)

    def _read_file(self, path: Path, name: str, kept: _File | None) -> _File:
        try:
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if kept is not None and kept.stamp == stamp:
                return kept
            check_readable(path, name, self._max_file_bytes)
            read = [(text.strip(), page) for text, page in self._pipeline.read(path)]
        except ConfigError:
            raise
        except FileNotFoundError as error:
            raise ConfigError(f"{name}: the file has vanished while it was being read.") from error
        except Exception as error:
            logger.debug("Cannot read %s", path, exc_info=True)
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ConfigError(f"{name}: cannot be read ({reason}).") from error
        texts = [(text, page) for text, page in read if any(map(str.isalnum, text))]
        if not texts:
            raise ConfigError(f"{name}: no text was found in it (a scan, perhaps?).")
        numbered = enumerate(texts, 1)
        return _File(stamp, [Passage(text, name, at, page) for at, (text, page) in numbered])

    def _reindex(self) -> None:
        passages = [passage for file in self._files.values() for passage in file.passages]
        if passages:
            self._pipeline.index(passages)
        self.passages = passages

    # Warming ------------------------------------------------------------------------------------

    def warm(self) -> None:
        """Encode what the store lacks, a few passages at a time, while no answer is generated."""
        done = 0
        while batch := self._next_cold(done):
            with self._quiet:
                self._quiet.wait_for(lambda: not self._answering)
            try:
                self._pipeline.warm(batch)
            except Exception:
                # They are encoded when they are first retrieved, or the error shows there.
                logger.warning("Passages could not be encoded ahead of time.", exc_info=True)
            done += len(batch)

    def _next_cold(self, done: int) -> list[Passage]:
        with self._lock:
            total = done + len(self._cold)
            batch = [self._cold.popleft() for _ in range(min(_AT_ONCE, len(self._cold)))]
            phase: Phase = "warming" if batch else "ready"
            self.status = Status(phase, done, total, batch[0].source if batch else "")
            return batch

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Hold warming back while an answer is generated."""
        with self._quiet:
            self._answering += 1
        try:
            yield
        finally:
            with self._quiet:
                self._answering -= 1
                self._quiet.notify_all()

    # Between two starts -------------------------------------------------------------------------

    def _load(self) -> dict[str, _File]:
        """Return files as an earlier start read them; nothing where that cannot be used."""
        try:
            kept = json.loads(self._index_file.read_text(encoding="utf-8"))
            return {
                name: _File(
                    (file["size"], file["modified"]),
                    [Passage(source=name, **passage) for passage in file["passages"]],
                )
                for name, file in kept.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            logger.warning("%s is damaged: the files are read again.", self._index_file)
            return {}

    def _save(self, files: dict[str, _File], kept: dict[str, _File]) -> None:
        """Keep what was read; where that fails, the next start reads again."""
        if files == kept:
            return
        content = {
            name: {
                "size": file.stamp[0],
                "modified": file.stamp[1],
                "passages": [_without_source(passage) for passage in file.passages],
            }
            for name, file in files.items()
        }
        folder = self._index_file.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=folder, suffix=".part", delete=False
            ) as file:
                json.dump(content, file, ensure_ascii=False)
            os.replace(file.name, self._index_file)
        except OSError as error:
            logger.warning("The index of %s could not be kept: %s", self.folder, error)


def forget_passages(directory: Path) -> int:
    """Remove the text that libraries have kept in a store's directory.

    Parameters
    ----------
    directory : Path
        The store's directory.

    Returns
    -------
    int
        How many folders of files it was read from.

    Raises
    ------
    StoreError
        A file cannot be removed.
    """
    folder = directory / _FOLDER
    kept = [path for path in folder.glob("*") if _KEPT.fullmatch(path.name)]
    try:
        for path in kept:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"Cannot remove the passages in {folder}: {error.strerror}.") from error
    return sum(path.suffix == ".json" for path in kept)


def _without_source(passage: Passage) -> dict[str, Any]:
    values = asdict(passage)
    del values["source"]
    return values
