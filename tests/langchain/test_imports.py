"""What is imported when, and what is said where LangChain is missing."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_LANGCHAIN = """
import sys
for name in list(sys.modules):
    assert not name.startswith("langchain"), name
sys.modules["langchain_core"] = None
import ape_integrations
assert "torch" not in sys.modules
from ape_integrations.errors import MissingDependencyError
for name in ("ChatAPE", "APEDocumentCompressor", "APELanguageModel"):
    try:
        getattr(ape_integrations, name)
    except MissingDependencyError as error:
        assert "ape-integrations[langchain]" in str(error), error
        assert isinstance(error, ImportError)
    else:
        raise AssertionError(name)
"""


def test_missing_langchain_names_the_extra() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_LANGCHAIN], check=True)


def test_public_names_are_those_of_the_subpackage() -> None:
    import ape_integrations
    import ape_integrations.langchain as side

    for name in side.__all__:
        assert getattr(ape_integrations, name) is getattr(side, name)
