"""Retrieval pipelines in LlamaIndex and LangChain whose retrieved text is never prefilled twice.

Names are imported when they are first used, so that ``import ape_integrations`` needs neither
framework, nor torch, and takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ape_integrations.core.config import APEConfig
    from ape_integrations.core.generation import GenerationResult, GenerationStream
    from ape_integrations.core.generator import APEGenerator
    from ape_integrations.errors import APEError
    from ape_integrations.langchain import APEDocumentCompressor, APELanguageModel, ChatAPE
    from ape_integrations.llama_index import APELLM, APECacheWarmer, APENodePostprocessor
    from ape_integrations.store import DiskKVStore, MemoryKVStore, RedisKVStore, TieredKVStore

_HOMES = {
    "APEConfig": "ape_integrations.core.config",
    "APEError": "ape_integrations.errors",
    "APEGenerator": "ape_integrations.core.generator",
    "GenerationResult": "ape_integrations.core.generation",
    "GenerationStream": "ape_integrations.core.generation",
    "APELLM": "ape_integrations.llama_index",
    "APENodePostprocessor": "ape_integrations.llama_index",
    "APECacheWarmer": "ape_integrations.llama_index",
    "ChatAPE": "ape_integrations.langchain",
    "APELanguageModel": "ape_integrations.langchain",
    "APEDocumentCompressor": "ape_integrations.langchain",
    "DiskKVStore": "ape_integrations.store",
    "RedisKVStore": "ape_integrations.store",
    "MemoryKVStore": "ape_integrations.store",
    "TieredKVStore": "ape_integrations.store",
}

__all__ = [
    "APELLM",
    "APECacheWarmer",
    "APEConfig",
    "APEDocumentCompressor",
    "APEError",
    "APEGenerator",
    "APELanguageModel",
    "APENodePostprocessor",
    "ChatAPE",
    "DiskKVStore",
    "GenerationResult",
    "GenerationStream",
    "MemoryKVStore",
    "RedisKVStore",
    "TieredKVStore",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*globals(), *__all__})
