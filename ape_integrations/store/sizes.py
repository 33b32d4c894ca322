"""Sizes as people write them: ``"20GB"``, ``"512MiB"``, ``1_000_000``."""

from __future__ import annotations

import re

from ape_integrations.errors import ConfigError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(size: int | str, name: str = "size_limit", *, least: int = 1) -> int:
    """Turn a size into bytes.

    Parameters
    ----------
    size : int or str
        Bytes, or a number with a unit: kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB
        (powers of 1024).
    name : str
        The setting's name, for the error message.
    least : int
        The smallest size that makes sense, in bytes.

    Returns
    -------
    int
        Bytes, at least ``least``.

    Raises
    ------
    ConfigError
        If it is not a size, or too small.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        number = size
    else:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None:
            raise ConfigError(
                f'{name}={size!r} is not a size; give bytes or a string such as "20GB" or "512MiB".'
            )
        digits, unit, binary = match.groups()
        number = int(float(digits) * (1024 if binary else 1000) ** _POWERS[unit.lower()])
    if number < least:
        wanted = "leaves no room for an entry; it must be positive" if least else "is negative"
        raise ConfigError(f"{name}={size!r} {wanted}.")
    return number


def format_size(nbytes: int) -> str:
    """Write bytes for people, in powers of 1000.

    Parameters
    ----------
    nbytes : int
        A number of bytes.

    Returns
    -------
    str
        For example ``"12.3 MB"``.
    """
    number = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
