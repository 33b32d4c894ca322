"""Files that commands write in the end, checked before the work begins."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

from ape_integrations.errors import ConfigError, MissingDependencyError

#: Kinds of plots.
PLOT_SUFFIXES = (".png", ".svg", ".pdf", ".jpg")


def check_folder(folder: Path, option: str) -> None:
    """Refuse a folder in which no file can be made.

    Parameters
    ----------
    folder : Path
        The folder.
    option : str
        The option that names it.

    Raises
    ------
    ConfigError
        Says why, and which option to change.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"Cannot write into {folder}: {error.strerror}. Choose another place with {option}."
        ) from error


def check_file(path: Path, option: str) -> None:
    """Refuse a file that cannot be written.

    Parameters
    ----------
    path : Path
        The file; it need not exist, its folder must.
    option : str
        The option that names it.

    Raises
    ------
    ConfigError
        Says why, and which option to change.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. Name a file with {option}.")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{path} is write-protected. Choose another file with {option}.")
    check_folder(path.parent, option)


def check_plotting() -> None:
    """Refuse to plot without matplotlib.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("Plots need matplotlib: pip install 'ape-integrations[plot]'.")


def check_plot(path: Path) -> None:
    """Refuse to start what cannot be plotted in the end.

    Parameters
    ----------
    path : Path
        File of the plot, as ``--plot`` names it.

    Raises
    ------
    ConfigError
        It cannot be written, or is of no kind that plots can have.
    MissingDependencyError
        matplotlib is not installed.
    """
    check_plotting()
    if path.suffix.lower() not in PLOT_SUFFIXES:
        kinds = ", ".join(PLOT_SUFFIXES)
        raise ConfigError(f"Cannot plot into {path}: its name must end in one of {kinds}.")
    check_file(path, "--plot")
