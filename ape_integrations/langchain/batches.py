"""``batch`` and ``abatch`` whose calls are answered together where they share their contexts.

Each call is an ``invoke`` of its own, with its own callbacks, trace and error. The generator finds
out which of them can be one generation; all that is said here is that they belong together, so
that the first one waits for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.language_models.base import LanguageModelInput
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from langchain_core.runnables.utils import gather_with_concurrency

from ape_integrations.core.batching import MOST_ROWS, Gathering, run_together

Configs = RunnableConfig | Sequence[RunnableConfig] | None


class BatchedCalls:
    """A language model's ``batch`` and ``abatch``; stands before LangChain's own classes."""

    def batch(
        self: Any,
        inputs: Sequence[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer several inputs; those that share their documents are answered together.

        Arguments as for every runnable of LangChain.
        """
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))  # type: ignore[arg-type]

        def invoke(pair: tuple[LanguageModelInput, RunnableConfig]) -> Any:
            try:
                return self.invoke(*pair, **kwargs)
            except Exception as error:
                if return_exceptions:
                    return error
                raise

        pairs = list(zip(inputs, configs, strict=True))
        if len(pairs) == 1:
            return [invoke(pairs[0])]
        return run_together(invoke, pairs, configs[0].get("max_concurrency"))

    async def abatch(
        self: Any,
        inputs: Sequence[LanguageModelInput],
        config: Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer several inputs; those that share their documents are answered together.

        Arguments as for every runnable of LangChain.
        """
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))  # type: ignore[arg-type]
        limit = configs[0].get("max_concurrency")
        gathering = Gathering(min(len(inputs), limit or MOST_ROWS))

        async def ainvoke(value: LanguageModelInput, own: RunnableConfig) -> Any:
            with gathering.member():
                try:
                    return await self.ainvoke(value, own, **kwargs)
                except Exception as error:
                    if return_exceptions:
                        return error
                    raise

        return await gather_with_concurrency(limit, *map(ainvoke, inputs, configs))
