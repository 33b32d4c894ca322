"""ChatAPE: a LangChain chat model that reads retrieved documents from stored KV states."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field
from transformers import StoppingCriteria

from ape_integrations.core.asynchronous import Pieces, run_generation, stopped_by
from ape_integrations.core.chat import render_chat
from ape_integrations.core.generation import GenerationResult, GenerationStream
from ape_integrations.core.generator import APEGenerator
from ape_integrations.core.settings import GenerationSettings
from ape_integrations.errors import ConfigError
from ape_integrations.langchain import capture  # noqa: F401  (registers the handler)
from ape_integrations.langchain.batches import BatchedCalls
from ape_integrations.langchain.documents import documents_within
from ape_integrations.langchain.messages import to_template_messages
from ape_integrations.langchain.overflow import overflow_errors
from ape_integrations.langchain.settings import APESettings, metadata, usage
from ape_integrations.langchain.structured import (
    Schema,
    StructuredParser,
    json_objects,
    schema_of_format,
    schema_tool,
    with_instruction,
)
from ape_integrations.langchain.tools import (
    ToolCallFilter,
    ToolCalls,
    ToolFormat,
    parse_tool_calls,
    tool_format,
)

Method = Literal["function_calling", "json_schema", "json_mode"]


@dataclass(frozen=True)
class _Call:
    """One request, ready for the generator."""

    generator: APEGenerator
    model_name: str
    prompt: str
    generation: dict[str, Any]
    tool_names: tuple[str, ...] = ()
    form: ToolFormat | None = None
    opening: str = ""  # how a forced tool call begins; part of the prompt and of the answer
    json_only: bool = False  # the answer is to be a JSON object and nothing else

    def generate(self, *criteria: StoppingCriteria) -> GenerationResult:
        generation = stopped_by(self.generation, *criteria)
        return self.generator.generate_prompt(self.prompt, **generation)

    def stream(self) -> GenerationStream:
        return self.generator.stream_prompt(self.prompt, **self.generation)

    def read(self, result: GenerationResult) -> ToolCalls:
        """Return text and tool calls of a result."""
        found = self._read(result)
        if self.json_only and not found.calls:
            written = (json.dumps(value, ensure_ascii=False) for value in json_objects(found.text))
            found.text = next(written, found.text)
        return found

    def _read(self, result: GenerationResult) -> ToolCalls:
        if self.form is None:
            return ToolCalls(result.text)
        # The marks of a tool call may be special tokens, which the text does not show.
        answer = self.generator.tokenizer.decode(
            self._without_end(result.token_ids),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        found = parse_tool_calls(f"{self.opening}{answer}", self.tool_names)
        if found.calls or found.invalid:
            return found
        return ToolCalls(self.opening + result.text)

    def _without_end(self, ids: Sequence[int]) -> list[int]:
        """Return an answer's tokens without those at its end that say that it ends."""
        model, tokenizer = self.generator.model, self.generator.tokenizer
        settings = GenerationSettings(self.generation, model.generation_config, 1)
        ends = {*settings.end_tokens, tokenizer.eos_token_id}
        kept = list(ids)
        while kept and kept[-1] in ends:
            kept.pop()
        return kept


class ChatAPE(BatchedCalls, APESettings, BaseChatModel):
    """Chat model whose retrieved documents are never prefilled twice.

    Documents that any LangChain retriever returns are recognised in the prompt, wherever a chain or
    an agent puts them, and their KV states come from the store. A prompt without them is answered
    as transformers alone would answer it. Nothing else in a chain changes.

    Every response says in ``response_metadata["ape"]`` what the cache did: ``contexts``, ``hits``,
    ``misses``, ``bytes_loaded``, ``first_token_seconds`` and others.

    Parameters
    ----------
    model : str, Path, PreTrainedModel, APEGenerator or None
        Hub name or directory, loaded when first needed; or a loaded model, with its ``tokenizer``;
        or a generator. None is the bundled demo model.
    temperature, max_tokens, top_p, stop, seed, model_kwargs
        Generation; each can be given per call or bound as well. Temperature 0 is greedy.
    attention_temperature, scaling_factor : float, optional
        T and S of APE.
    store : KVStore, str or Path, optional
        Where KV states are kept; ``cache_dir`` is another name for a directory. The LlamaIndex
        side may use the same one.
    capture : bool
        Whether retrieved documents are registered automatically.
    template_kwargs : dict
        Arguments for the chat template, such as ``enable_thinking``.
    load_kwargs : dict
        Arguments for ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Examples
    --------
    >>> from ape_integrations import ChatAPE
    >>> chat = ChatAPE(temperature=0, max_tokens=20)
    >>> answer = chat.invoke("Hello")
    >>> answer.response_metadata["ape"]["contexts"]
    0
    """

    streaming: bool = False
    """Whether ``invoke`` streams inside, so that callbacks see tokens."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "ape-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**self._answer_params(), "template_kwargs": self.template_kwargs}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params.setdefault("ls_model_name", self.name_of_model)
        return params

    # Requests -----------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[BaseMessage],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """Return the prompt that the model reads for some messages.

        Parameters
        ----------
        messages : sequence of BaseMessage
            A conversation; text only.
        tools : sequence of dict, optional
            Tools in OpenAI's form.

        Raises
        ------
        ConfigError
            Content other than text, or tools that the chat template has no place for.
        """
        return self._render(self.generator, messages, tools)

    def _render(
        self,
        generator: APEGenerator,
        messages: Sequence[BaseMessage],
        tools: Sequence[dict[str, Any]] | None,
    ) -> str:
        return render_chat(
            generator.tokenizer,
            to_template_messages(messages),
            tools=tools or None,
            **self.template_kwargs,
        )

    def _prepare(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> _Call:
        kwargs = dict(kwargs)
        engine, name = self._engine_for(kwargs.pop("model", None))
        choice = kwargs.pop("tool_choice", None)
        tools = _as_tools(kwargs.pop("tools", None) or ())
        structured = kwargs.pop("structured_output", None)
        response_format = kwargs.pop("response_format", None)
        if response_format is not None and (tool := schema_of_format(response_format)):
            structured = {"method": "json_schema", "tool": tool}
        generator = engine.generator
        if structured is not None:
            method = structured["method"]
            if method is None:
                method = (
                    "function_calling"
                    if _has_tools(generator, structured["tool"])
                    else "json_schema"
                )
            if method == "function_calling":
                tools = [structured["tool"]]
                choice = structured["tool"]["function"]["name"]
            elif method == "json_schema":
                messages = with_instruction(messages, structured["tool"])
        if self.capture:
            generator.registry.register(d.page_content for d in documents_within(messages))
        if _choice_name(choice) == "none":
            tools = []
        names = tuple(tool["function"]["name"] for tool in tools)
        form = tool_format(_template(generator, tools)) if tools else None
        opening = _opening(form, choice, names) if form else ""
        return _Call(
            generator=generator,
            model_name=name,
            prompt=self._render(generator, messages, tools) + opening,
            generation=self._generation_kwargs(stop, kwargs),
            tool_names=names,
            form=form,
            opening=opening,
            json_only=response_format is not None and response_format["type"] != "text",
        )

    # Answers ------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._prepare(messages, stop, kwargs)
        with overflow_errors():
            return _chat_result(call, call.generate())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        def generate(cancellation: StoppingCriteria) -> ChatResult:
            call = self._prepare(messages, stop, kwargs)
            with overflow_errors():
                return _chat_result(call, call.generate(cancellation))

        return await run_generation(generate)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._prepare(messages, stop, kwargs)
        chunks = _Chunks(call)
        with overflow_errors(), closing(call.stream()) as stream:
            for piece in stream:
                yield from chunks.of(piece)
            yield chunks.last(stream.result)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        def start() -> tuple[_Call, GenerationStream]:
            call = self._prepare(messages, stop, kwargs)
            with overflow_errors():
                return call, call.stream()

        call, stream = await asyncio.to_thread(start)
        chunks = _Chunks(call)
        with overflow_errors():
            async with aclosing(Pieces(stream)) as pieces:
                async for piece in pieces:
                    for chunk in chunks.of(piece):
                        yield chunk
        yield chunks.last(stream.result)

    # Tokens -------------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of a text by the model's own tokenizer."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.generator.tokens.rest(text)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Return how many tokens messages and tools have as rendered, answer's header included."""
        shown = _as_tools(tools or ())
        return len(self.generator.tokens.prompt(self.render(messages, tools=shown)))

    # Tools and structured output ----------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Show tools to the model through its chat template.

        Parameters
        ----------
        tools : sequence
            Tools, functions, pydantic classes or JSON schemas.
        tool_choice : str, dict or bool, optional
            ``"auto"``, ``"none"``, ``"any"`` or a tool's name; or a dict with one of these as
            ``type`` or ``name``. A call is forced by beginning the answer with it.
        strict, parallel_tool_calls : bool, optional
            Taken for other models' sake; a local model knows neither.

        Raises
        ------
        ConfigError
            The tool choice names no tool. That the chat template has no place for tools shows in
            the first call, because the model is not loaded before.
        """
        shown = _as_tools(tools)
        choice = _normalised_choice(tool_choice, [tool["function"]["name"] for tool in shown])
        return self.bind(tools=shown, **({"tool_choice": choice} if choice else {}), **kwargs)

    def with_structured_output(
        self,
        schema: Schema,
        *,
        include_raw: bool = False,
        method: Method | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a runnable that answers in the shape of a schema.

        Parameters
        ----------
        schema : type or dict
            Pydantic class, TypedDict, JSON schema or tool.
        include_raw : bool
            Give ``{"raw", "parsed", "parsing_error"}`` instead of raising for answers that cannot
            be read.
        method : str, optional
            ``"function_calling"`` (the schema is a tool), ``"json_schema"`` (the schema stands at
            the end of the prompt) or ``"json_mode"`` (the prompt itself asks for JSON). None takes
            the first one that the chat template has a place for.
        strict : bool, optional
            Taken for other models' sake; a local model does not know it.

        Notes
        -----
        An answer becomes an instance of a pydantic class, and is thereby validated. For a
        TypedDict or a JSON schema it is read only: the dict may lack keys of the schema, or hold
        other ones.
        """
        if method not in (None, "function_calling", "json_schema", "json_mode"):
            raise ConfigError(f"Unknown method {method!r} of structured output.")
        tool = schema_tool(schema)
        model = self.bind(
            structured_output={"method": method, "tool": tool},
            ls_structured_output_format={
                "kwargs": {"method": method or "json_schema"},
                "schema": tool,
            },
            **kwargs,
        )
        parser = StructuredParser(target=schema)
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        )
        unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks(
            [unparsed], exception_key="parsing_error"
        )


class _Chunks:
    """Makes chunks of the pieces of one stream."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._filter = ToolCallFilter(call.form) if call.form else None
        self._shown = ""

    def of(self, piece: str) -> Iterator[ChatGenerationChunk]:
        text = piece
        if self._filter is not None:
            text = "" if self._call.opening else self._filter.push(piece)
        if text:
            self._shown += text
            yield ChatGenerationChunk(message=AIMessageChunk(content=text))

    def last(self, result: GenerationResult) -> ChatGenerationChunk:
        """Return the rest of the text, tool calls, usage and metadata."""
        found = self._call.read(result)
        rest = found.text[len(self._shown) :] if found.text.startswith(self._shown) else ""
        calls = [
            tool_call_chunk(
                name=call["name"], args=json.dumps(call["args"]), id=call["id"], index=index
            )
            for index, call in enumerate(found.calls)
        ]
        calls += [
            tool_call_chunk(name=bad["name"], args=bad["args"], id=bad["id"], index=index)
            for index, bad in enumerate(found.invalid, len(calls))
        ]
        return ChatGenerationChunk(
            message=AIMessageChunk(
                content=rest,
                tool_call_chunks=calls,
                usage_metadata=usage(result),
                response_metadata=metadata(result, self._call.model_name),
                chunk_position="last",
            )
        )


def _chat_result(call: _Call, result: GenerationResult) -> ChatResult:
    found = call.read(result)
    message = AIMessage(
        content=found.text,
        tool_calls=found.calls,
        invalid_tool_calls=found.invalid,
        usage_metadata=usage(result),
        response_metadata=metadata(result, call.model_name),
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def _as_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Return tools in OpenAI's form.

    Raises
    ------
    ConfigError
        One is a service of another provider, which a local model cannot call.
    """
    shown = [convert_to_openai_tool(tool) for tool in tools]
    for tool in shown:
        if "function" not in tool:
            raise ConfigError(
                f"The tool {tool.get('type')!r} is run by another provider. Pass a function or a "
                "tool of your own that does the same."
            )
    return shown


def _template(generator: APEGenerator, tools: Sequence[Any]) -> str:
    try:
        template: str = generator.tokenizer.get_chat_template(tools=list(tools))
    except ValueError:  # no template at all: rendering says so
        return ""
    return template


def _has_tools(generator: APEGenerator, tool: dict[str, Any]) -> bool:
    """Whether the chat template has a place for tools."""
    try:
        render_chat(generator.tokenizer, [{"role": "user", "content": "?"}], tools=[tool])
    except ConfigError:
        return False
    return True


def _normalised_choice(choice: str | dict[str, Any] | bool | None, names: list[str]) -> str | None:
    """Return None for a free choice, ``"none"``, ``"any"`` or a tool's name."""
    choice = _choice_name(choice)
    if choice in (None, False, "auto"):
        return None
    if choice in (True, "any", "required"):
        return "any"
    if choice != "none" and choice not in names:
        raise ConfigError(f"tool_choice {choice!r} is none of the tools: {', '.join(names)}.")
    return str(choice)


def _choice_name(choice: Any) -> Any:
    """Return what a tool choice says in a dict, in whichever form, or the choice itself."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") in ("auto", "none", "any", "required"):
        return choice["type"]
    named = choice.get("function", choice)
    return str(named.get("name") if isinstance(named, dict) else named)


def _opening(form: ToolFormat, choice: Any, names: tuple[str, ...]) -> str:
    """Return how the answer must begin for the tool choice of a call."""
    normalised = _normalised_choice(choice, list(names))
    if normalised is None:
        return ""
    if normalised == "any":
        return form.forced_opening(names[0] if len(names) == 1 else None)
    return form.forced_opening(normalised)
