"""APELanguageModel: a LangChain completion model on the same generator as ChatAPE."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from transformers import StoppingCriteria

from ape_integrations.core.asynchronous import Pieces, run_generation, stopped_by
from ape_integrations.core.batching import run_together
from ape_integrations.core.generation import GenerationResult, GenerationStream
from ape_integrations.core.generator import APEGenerator
from ape_integrations.langchain import capture  # noqa: F401  (registers the handler)
from ape_integrations.langchain.batches import BatchedCalls
from ape_integrations.langchain.overflow import overflow_errors
from ape_integrations.langchain.settings import APESettings, metadata, usage


class APELanguageModel(BatchedCalls, APESettings, BaseLLM):
    """Completion model whose retrieved documents are never prefilled twice.

    Continues a prompt as it is, without a chat template; for chat models see `ChatAPE`, whose
    parameters it shares. ``generation_info["ape"]`` says what the cache did.

    Examples
    --------
    >>> from ape_integrations import APELanguageModel
    >>> model = APELanguageModel(temperature=0, max_tokens=20)
    >>> result = model.generate(["Hello"])
    >>> result.generations[0][0].generation_info["ape"]["contexts"]
    0
    """

    @property
    def _llm_type(self) -> str:
        return "ape"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._answer_params()

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "ape"
        params.setdefault("ls_model_name", self.name_of_model)
        return params

    def _prepare(
        self, stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[APEGenerator, str, dict[str, Any]]:
        kwargs = dict(kwargs)
        engine, name = self._engine_for(kwargs.pop("model", None))
        return engine.generator, name, self._generation_kwargs(stop, kwargs)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._complete(prompts, stop, kwargs)

    def _complete(
        self,
        prompts: list[str],
        stop: list[str] | None,
        kwargs: dict[str, Any],
        *criteria: StoppingCriteria,
    ) -> LLMResult:
        generator, name, generation = self._prepare(stop, kwargs)
        generation = stopped_by(generation, *criteria)

        def answer(prompt: str) -> GenerationResult:
            return generator.generate_prompt(prompt, **generation)

        with overflow_errors():
            results = [answer(prompts[0])] if len(prompts) == 1 else run_together(answer, prompts)
        return _llm_result(results, name)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        def generate(cancellation: StoppingCriteria) -> LLMResult:
            return self._complete(prompts, stop, kwargs, cancellation)

        return await run_generation(generate)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        generator, name, generation = self._prepare(stop, kwargs)
        with overflow_errors(), closing(generator.stream_prompt(prompt, **generation)) as stream:
            for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager is not None:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield GenerationChunk(text="", generation_info=_info(stream.result, name))

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        def start() -> tuple[GenerationStream, str]:
            generator, name, generation = self._prepare(stop, kwargs)
            with overflow_errors():
                return generator.stream_prompt(prompt, **generation), name

        stream, name = await asyncio.to_thread(start)
        with overflow_errors():
            async with aclosing(Pieces(stream)) as pieces:
                async for piece in pieces:
                    chunk = GenerationChunk(text=piece)
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(piece, chunk=chunk)
                    yield chunk
        yield GenerationChunk(text="", generation_info=_info(stream.result, name))

    # Tokens -------------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of a text by the model's own tokenizer."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.generator.tokens.rest(text)


def _info(result: GenerationResult, name: str) -> dict[str, Any]:
    return {**metadata(result, name), "usage_metadata": usage(result)}


def _llm_result(results: list[GenerationResult], name: str) -> LLMResult:
    totals = {
        key: sum(result.usage[key] for result in results)
        for key in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    return LLMResult(
        generations=[[Generation(text=r.text, generation_info=_info(r, name))] for r in results],
        llm_output={"token_usage": totals, "model_name": name},
    )
