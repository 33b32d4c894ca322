"""Answers on file as they come, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.modes import Answer, Mode
from ape_integrations.evaluation.prompts import Case


class AnswerLog:
    """Answers by case and mode, in memory and, where a file is named, on disk.

    The file is JSON Lines: the settings first, then one answer a line, written as it is given. What
    a kill has left of a last line is dropped.

    Parameters
    ----------
    path : Path, optional
        The file; it is created where there is none.
    settings : dict
        What answers depend on besides case and mode. More modes or cases may be added to a file.

    Raises
    ------
    ConfigError
        The file holds answers under other settings, or no answers at all.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._answers: dict[tuple[str, str], Answer] = {}
        self._file: TextIO | None = None
        # As they will be read back.
        self._settings = json.loads(json.dumps(settings))
        self._modes: dict[str, Any] = {}
        if path is None:
            return
        try:
            if path.exists() and path.stat().st_size:
                self._read(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"Cannot use {path} for the answers: {error.strerror}.") from error
        if not self._file.tell():
            self._write({"settings": self._settings})

    def __len__(self) -> int:
        """Return how many answers there are."""
        return len(self._answers)

    def use(self, mode: Mode, description: Mapping[str, Any]) -> None:
        """Say what a mode's label stands for.

        Raises
        ------
        ConfigError
            The file's answers of this label come from another config.
        """
        description = json.loads(json.dumps(description))
        known = self._modes.get(mode.label)
        if known is not None and known != description:
            raise ConfigError(
                f"The answers of mode {mode.label!r} on file were given with {known['config']}, "
                f"not {description['config']}. Name another file."
            )
        if known is None:
            self._modes[mode.label] = description
            self._write({"mode": mode.label, "description": description})

    def get(self, case: Case, mode: Mode) -> Answer | None:
        """Return the answer that is there already, if it is."""
        return self._answers.get((case.digest, mode.label))

    def add(self, case: Case, mode: Mode, answer: Answer) -> None:
        """Keep an answer."""
        self._answers[case.digest, mode.label] = answer
        self._write({"case": case.digest, "answer_of": mode.label, **asdict(answer)})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

    def _read(self, path: Path) -> None:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
            settings = first["settings"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(
                f"{path} is no file of answers (its first line holds no settings, or a line is not "
                "JSON). Name another file, or delete it."
            ) from error
        if settings != self._settings:
            raise ConfigError(
                f"{path} holds answers under other settings: "
                f"{_differences(settings, self._settings)}. Name another file, or set them alike."
            )
        for number, line in enumerate(lines, 2):
            try:
                self._take(line)
            except (TypeError, KeyError, AttributeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: this is no answer that `ape-integrations eval` has "
                    "written. Delete the line, or name another file."
                ) from error
        if len(whole) < len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def _take(self, line: Any) -> None:
        """Take over a line of the file."""
        if "mode" in line:
            self._modes[line["mode"]] = {"config": None, **line["description"]}
        else:
            key = line.pop("case"), line.pop("answer_of")
            self._answers[key] = Answer(**line)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names)
