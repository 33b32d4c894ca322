"""How the key of a context becomes the key of an entry in a shared medium."""

from __future__ import annotations

import re

from ape_integrations.errors import ConfigError
from ape_integrations.store import serialization
from ape_integrations.store.quantization import check_kv_dtype

_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{0,100}")
_KEY = re.compile(r"[A-Za-z0-9._:-]{1,200}")


class KeySpace:
    """Keeps apart what must never be shared: format versions, namespaces, ways of rounding.

    Parameters
    ----------
    namespace : str
        Letters, digits, ``.``, ``_`` and ``-``.
    kv_dtype : str
        One of `quantization.KV_DTYPES`.

    Raises
    ------
    ConfigError
        If one of them is not acceptable.
    """

    def __init__(self, namespace: str, kv_dtype: str) -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise ConfigError(
                f"namespace={namespace!r} may only hold letters, digits, '.', '_' and '-'."
            )
        self.namespace = namespace
        self.kv_dtype = check_kv_dtype(kv_dtype)
        self.version = f"v{serialization.FORMAT_VERSION}/"
        self.prefix = f"{self.version}{namespace}/{kv_dtype}/"

    def full(self, key: str) -> str:
        """Return the key of an entry; ConfigError for a key that could be text."""
        if not _KEY.fullmatch(key):
            raise ConfigError(f"{key[:50]!r} is not a key; keys are hashes in hexadecimal digits.")
        return self.prefix + key
