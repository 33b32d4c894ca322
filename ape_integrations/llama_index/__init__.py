"""Adaptive Parallel Encoding for LlamaIndex pipelines."""

from __future__ import annotations

from ape_integrations.errors import MissingDependencyError

try:
    import llama_index.core  # noqa: F401  (only to see whether it is installed)
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "llama_index":
        raise
    raise MissingDependencyError(
        "LlamaIndex is not installed. Install it with: pip install 'ape-integrations[llama-index]'"
    ) from error

from ape_integrations.llama_index.llm import APELLM
from ape_integrations.llama_index.postprocessor import APENodePostprocessor
from ape_integrations.llama_index.warmer import APECacheWarmer

__all__ = ["APELLM", "APECacheWarmer", "APENodePostprocessor"]
