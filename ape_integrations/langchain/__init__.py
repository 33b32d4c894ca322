"""LangChain: a chat model, a completion model and a document compressor.

Retrieved documents are recognised in the prompt that a chain or an agent built, and their KV states
come from the store instead of a forward pass.
"""

from __future__ import annotations

from ape_integrations.errors import MissingDependencyError

try:
    import langchain_core  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "ChatAPE, APELanguageModel and APEDocumentCompressor need LangChain, which is not "
        "installed: pip install 'ape-integrations[langchain]'"
    ) from error

from ape_integrations.langchain.chat_model import ChatAPE
from ape_integrations.langchain.compressor import APEDocumentCompressor
from ape_integrations.langchain.llm import APELanguageModel

__all__ = ["APEDocumentCompressor", "APELanguageModel", "ChatAPE"]
