"""T and S that were tuned for a model: kept on file, found again by the model's fingerprint."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from ape_integrations.core.fingerprint import model_fingerprint
from ape_integrations.errors import ConfigError
from ape_integrations.models import DEMO_MODEL_NAME, demo_model_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TunedSettings:
    """What ``ape-integrations tune`` found for one model.

    Parameters
    ----------
    model : str
        Name or absolute directory that it was tuned under.
    fingerprint : str
        The model's fingerprint, 64 hexadecimal digits.
    attention_temperature, scaling_factor : float
        T and S to use; the defaults where nothing better was found.
    recommended : bool
        Whether they differ from the defaults.
    report : dict
        What was measured: metric, cases, gain over the defaults with its interval.
    saved : float
        When, in seconds since the epoch.
    """

    model: str
    fingerprint: str
    attention_temperature: float
    scaling_factor: float
    recommended: bool
    report: dict[str, Any] = field(default_factory=dict)
    saved: float = field(default_factory=time.time)


def tuned_directory() -> Path:
    """Return the directory of tuned settings in the user's data directory."""
    return Path(platformdirs.user_data_dir("ape-integrations", appauthor=False)) / "tuned"


def known_as(name: str | os.PathLike[str]) -> str:
    """Return the name under which a model's settings are kept: a directory is absolute."""
    path = Path(name).expanduser()
    if path.is_dir():
        absolute = str(path.resolve())
        return DEMO_MODEL_NAME if absolute == str(Path(demo_model_path()).resolve()) else absolute
    return str(name)


def save_tuned(settings: TunedSettings, path: Path | None = None) -> Path:
    """Write settings, replacing older ones of the same model.

    Parameters
    ----------
    settings : TunedSettings
    path : Path, optional
        The file; by default one in :func:`tuned_directory` named by the fingerprint.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        It cannot be written.
    """
    path = path or tuned_directory() / f"{settings.fingerprint}.json"
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(
            f"Cannot write the tuned settings to {path}: {error.strerror}. Name a file with --out."
        ) from error
    return path


def load_tuned(model: Any, path: str | os.PathLike[str] | None = None) -> TunedSettings:
    """Find the settings of a model.

    Parameters
    ----------
    model : str, Path, PreTrainedModel or APEGenerator
        A loaded model is found by its weights. A name or directory is found by itself, without
        loading anything; of several results the newest counts.
    path : path, optional
        The file to read; by default whatever fits in :func:`tuned_directory`.

    Raises
    ------
    ConfigError
        There are no settings, or those of the file belong to another model.
    """
    name, fingerprint = _identity(model)
    found = [_read(Path(path))] if path is not None else _all_saved()
    fitting = [
        settings
        for settings in found
        if (settings.fingerprint == fingerprint if fingerprint else settings.model == name)
    ]
    if fitting:
        return max(fitting, key=lambda settings: settings.saved)
    shown = name if fingerprint is None else f"{name} (fingerprint {fingerprint[:12]})"
    where = f"in {path}" if path is not None else "saved"
    raise ConfigError(
        f"There are no tuned settings of {shown} {where}. Tune it with `ape-integrations tune "
        "--model ... --data ...`, or use APEConfig(), which has the defaults. Other weights, "
        "another dtype or an adapter make it another model."
    )


def _identity(model: Any) -> tuple[str, str | None]:
    """Return a model's name and, where it is loaded, its fingerprint."""
    if isinstance(model, (str, os.PathLike)):
        return known_as(model), None
    from torch import nn

    if not isinstance(model, nn.Module):
        model = getattr(model, "model", None)  # APEGenerator
    if not isinstance(model, nn.Module):
        raise ConfigError("model must be a name, a directory, a loaded model or an APEGenerator.")
    loaded: Any = model
    return known_as(loaded.config._name_or_path or "the model"), model_fingerprint(loaded)


def _all_saved() -> list[TunedSettings]:
    """Read the user's files; a bad one is no reason to refuse the others."""
    found = []
    for path in sorted(tuned_directory().glob("*.json")):
        try:
            found.append(_read(path))
        except ConfigError as error:
            logger.warning("%s", error)
    return found


def _read(path: Path) -> TunedSettings:
    try:
        return TunedSettings(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"Cannot read tuned settings from {path}: {error}. Delete it and tune again."
        ) from error
