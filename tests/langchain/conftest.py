"""Nothing here writes into the user's cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ape_integrations.langchain import engine


@pytest.fixture(scope="session", autouse=True)
def own_cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def nothing_retrieved_before() -> None:
    """Models get the process's latest retrievals; here these are other tests'."""
    engine._recent.clear()
