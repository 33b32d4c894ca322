"""APELLM: a LlamaIndex LLM that reads retrieved text from stored KV states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW, DEFAULT_NUM_OUTPUTS
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.types import BaseOutputParser, PydanticProgramMode

from ape_integrations.core.asynchronous import run_generation, stopped_by
from ape_integrations.core.config import APEConfig
from ape_integrations.errors import ConfigError
from ape_integrations.llama_index import capture as capturing
from ape_integrations.llama_index.arguments import clear_argument_errors, generation_arguments
from ape_integrations.llama_index.lazy import LazyGenerator, Pipeline, Source
from ape_integrations.llama_index.messages import TemplateRenderer, with_system_prompt
from ape_integrations.llama_index.responses import (
    aread,
    chat_answer,
    chat_piece,
    completion,
    completion_piece,
    read,
)
from ape_integrations.models import DEMO_MODEL_NAME
from ape_integrations.store import check_store

if TYPE_CHECKING:
    from ape_integrations.core.generation import GenerationResult, GenerationStream
    from ape_integrations.core.generator import APEGenerator
    from ape_integrations.store import KVStore

#: Fields that the generator is made of, or that decide what reaches it.
_SETTLED = frozenset(
    {
        "model_name",
        "tokenizer_name",
        "model_kwargs",
        "tokenizer_kwargs",
        "device_map",
        "attention_temperature",
        "scaling_factor",
        "ape_config",
        "cache_dir",
        "capture",
    }
)


class APELLM(CustomLLM):
    """An LLM for LlamaIndex whose retrieved text is prefilled once and read from a store after.

    Takes the parameters of ``HuggingFaceLLM``, so that changing the class is enough. The model is
    loaded on first use. One object may be used from many threads and coroutines; the async methods
    leave the event loop free.

    Every response has ``raw``: ``usage`` (``prompt_tokens``, ``completion_tokens``,
    ``total_tokens``, ``cached_tokens``), ``finish_reason`` ("stop" or "length") and ``ape``
    (``contexts``, ``hits``, ``misses``, ``bytes_loaded``, ``plan`` and others, and seconds:
    ``load_seconds``, ``encode_seconds``, ``first_token_seconds``, ``total_seconds``). A stream
    carries it in its last response.

    Parameters
    ----------
    model_name : str, optional
        Hub name or directory of a decoder-only model. None, and no ``model``: the bundled demo
        model.
    tokenizer_name : str, optional
        Where the tokenizer comes from, if not from ``model_name``.
    model, tokenizer : optional
        Loaded objects of transformers. A string is taken for a name.
    generator : APEGenerator, optional
        A loaded generator, to share it; instead of whatever says how to load one, of store, T
        and S.
    context_window : int, optional
        Tokens that LlamaIndex packs into one prompt. None: the model's position limit, at least
        LlamaIndex's own default of 3900, as its synthesizers cut nodes to pieces below that; and
        where retrieved nodes are more, synthesizers pack up to four times as much into one prompt
        instead of cutting, as contexts share positions. What the model cannot read is an error,
        never cut in silence.
    max_new_tokens : int
        Tokens to generate where a call does not say.
    generate_kwargs, model_kwargs, tokenizer_kwargs : dict, optional
        For ``model.generate()``, ``AutoModelForCausalLM.from_pretrained`` and
        ``AutoTokenizer.from_pretrained``. Where files come from (``revision``, ``token``,
        ``trust_remote_code``, ``gguf_file``, ...) holds for the tokenizer too.
    device_map : optional
        As transformers takes it. "auto" is left out on a machine without an accelerator.
    system_prompt : str, optional
        Put before every completion; in chats merged with a leading system message.
    query_wrapper_prompt : str or PromptTemplate, optional
        Template with ``{query_str}`` around completion prompts.
    messages_to_prompt, completion_to_prompt : callable, optional
        Renderers to use instead of the tokenizer's chat template and of the bare prompt.
    is_chat_model : bool, optional
        Whether engines send chat messages. None: yes, if the tokenizer has a chat template.
    stopping_ids : list of int, optional
        Tokens that end a generation besides the model's own.
    tokenizer_outputs_to_remove : list of str, optional
        Accepted for compatibility: nothing but token ids is taken from the tokenizer.
    attention_temperature, scaling_factor : float, optional
        T and S of APE, see ``APEConfig``.
    ape_config : APEConfig, optional
        All settings of APE at once, instead of the two above.
    store : KVStore, str or Path, optional
        Where states are kept; a path is a directory.
    cache_dir : str or Path, optional
        Directory of the store. None: the user's cache directory.
    capture : bool
        Whether to learn retrieved texts from LlamaIndex's instrumentation. Without it, only
        `APENodePostprocessor` and `register_contexts` make texts known.
    callback_manager, output_parser, pydantic_program_mode, rate_limiter
        As for every LLM of LlamaIndex.
    class_name : str, optional
        Written by LlamaIndex where it serialises a component with this LLM in it; ignored.

    Raises
    ------
    ConfigError
        T or S out of range, arguments that exclude each other, or a change of what a loaded
        model cannot follow.
    """

    model_name: str | None = Field(default=None, description="Hub name or directory.")
    tokenizer_name: str | None = Field(default=None, description="Hub name or directory.")
    context_window: int | None = Field(
        default=None, gt=0, description="Tokens that are packed into one prompt."
    )
    max_new_tokens: int = Field(
        default=DEFAULT_NUM_OUTPUTS, gt=0, description="Tokens to generate at most."
    )
    is_chat_model: bool | None = Field(default=None, description="Whether engines send messages.")
    device_map: Any = Field(default="auto", description="Where transformers puts the model.")
    stopping_ids: list[int] = Field(default_factory=list, description="Tokens that end it.")
    tokenizer_outputs_to_remove: list[str] = Field(
        default_factory=list, description="For compatibility; only token ids are used."
    )
    tokenizer_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="For loading the tokenizer."
    )
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="For loading.")
    generate_kwargs: dict[str, Any] = Field(default_factory=dict, description="For generating.")
    attention_temperature: float = Field(default=0.9, description="T of APE.")
    scaling_factor: float = Field(default=0.9, description="S of APE.")
    ape_config: APEConfig | None = Field(default=None, description="All settings of APE.")
    cache_dir: str | None = Field(default=None, description="Directory of the store.")
    capture: bool = Field(default=True, description="Learn texts from events.")

    _lazy: LazyGenerator = PrivateAttr()

    def __init__(
        self,
        *,
        model_name: str | None = None,
        tokenizer_name: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        generator: APEGenerator | None = None,
        context_window: int | None = None,
        max_new_tokens: int = DEFAULT_NUM_OUTPUTS,
        generate_kwargs: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        device_map: Any = "auto",
        system_prompt: str | None = None,
        query_wrapper_prompt: str | PromptTemplate | None = None,
        messages_to_prompt: Callable[[Sequence[ChatMessage]], str] | None = None,
        completion_to_prompt: Callable[[str], str] | None = None,
        is_chat_model: bool | None = None,
        stopping_ids: list[int] | None = None,
        tokenizer_outputs_to_remove: list[str] | None = None,
        attention_temperature: float | None = None,
        scaling_factor: float | None = None,
        ape_config: APEConfig | Mapping[str, Any] | None = None,
        store: KVStore | str | Path | None = None,
        cache_dir: str | Path | None = None,
        capture: bool = True,
        callback_manager: CallbackManager | None = None,
        output_parser: BaseOutputParser | None = None,
        pydantic_program_mode: PydanticProgramMode = PydanticProgramMode.DEFAULT,
        rate_limiter: Any = None,
        class_name: str | None = None,
    ) -> None:
        if store is not None and cache_dir is not None:
            raise ConfigError("store and cache_dir are the same thing: pass one of them.")
        check_store(store)
        if isinstance(store, (str, Path)):
            store, cache_dir = None, store
        model, model_name = _by_name("model", model, model_name)
        tokenizer, tokenizer_name = _by_name("tokenizer", tokenizer, tokenizer_name)
        if generator is not None:
            _refuse_besides_generator(
                model_name=model_name,
                tokenizer_name=tokenizer_name,
                model=model,
                tokenizer=tokenizer,
                model_kwargs=model_kwargs or None,
                tokenizer_kwargs=tokenizer_kwargs or None,
                device_map=None if device_map == "auto" else device_map,
                store=store,
                cache_dir=cache_dir,
                ape_config=ape_config,
                attention_temperature=attention_temperature,
                scaling_factor=scaling_factor,
            )
            model, config = generator.model, generator.config
        else:
            config = _config(ape_config, attention_temperature, scaling_factor)
        source = Source(
            model_name=model_name,
            tokenizer_name=tokenizer_name,
            model=model,
            tokenizer=tokenizer,
            model_kwargs=model_kwargs or {},
            tokenizer_kwargs=tokenizer_kwargs or {},
            device_map=device_map,
            store=cache_dir if store is None else store,
            config=config,
        )
        lazy = LazyGenerator(source, generator, capture=capture)
        if isinstance(query_wrapper_prompt, str):
            query_wrapper_prompt = PromptTemplate(query_wrapper_prompt)
        super().__init__(
            model_name=model_name,
            tokenizer_name=tokenizer_name,
            context_window=context_window,
            max_new_tokens=max_new_tokens,
            generate_kwargs=generate_kwargs or {},
            model_kwargs=model_kwargs or {},
            tokenizer_kwargs=tokenizer_kwargs or {},
            device_map=device_map,
            system_prompt=system_prompt or None,
            query_wrapper_prompt=query_wrapper_prompt,
            messages_to_prompt=messages_to_prompt or TemplateRenderer(lazy.tokenizer),
            completion_to_prompt=completion_to_prompt,
            is_chat_model=is_chat_model,
            stopping_ids=stopping_ids or [],
            tokenizer_outputs_to_remove=tokenizer_outputs_to_remove or [],
            attention_temperature=config.attention_temperature,
            scaling_factor=config.scaling_factor,
            ape_config=None if ape_config is None else config,
            cache_dir=None if cache_dir is None else str(cache_dir),
            capture=capture,
            callback_manager=callback_manager,
            output_parser=output_parser,
            pydantic_program_mode=pydantic_program_mode,
            rate_limiter=rate_limiter,
        )
        self._lazy = lazy
        if capture:
            capturing.listen(lazy)

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises the LLM."""
        return "APELLM"

    def __getstate__(self) -> dict[str, Any]:
        """Return the recipe, never the model: whoever unpickles it loads the model itself."""
        if not self._lazy.source.is_portable:
            raise ConfigError(
                "An APELLM made of loaded objects cannot go to another process: name the model "
                "(model_name=...) and the store's directory (cache_dir=...) instead."
            )
        state = BaseModel.__getstate__(self)
        fields = dict(state["__dict__"])
        for name in ("callback_manager", "rate_limiter"):
            fields.pop(name, None)
        if isinstance(fields.get("messages_to_prompt"), TemplateRenderer):
            del fields["messages_to_prompt"]
        return {**state, "__dict__": fields, "__pydantic_private__": None}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; refuse those that made the generator, which would change nothing."""
        _refuse_settled({name: value})
        super().__setattr__(name, value)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy that shares the model.

        Parameters
        ----------
        update : mapping, optional
            Fields to change; those that made the generator cannot.
        deep : bool
            Whether fields are copied too. The model never is.

        Raises
        ------
        ConfigError
            An update would change nothing.
        """
        _refuse_settled({k: v for k, v in (update or {}).items() if v != getattr(self, k, None)})
        return super().model_copy(update=update, deep=deep)

    @property
    def metadata(self) -> LLMMetadata:
        """Describe the LLM; reads config and tokenizer, but does not load the model."""
        window = self.context_window
        if window is None:
            # Below that, the fixed padding of LlamaIndex's synthesizers leaves no room for nodes.
            window = max(self._lazy.max_positions() or 0, DEFAULT_CONTEXT_WINDOW)
        is_chat = self.is_chat_model
        if is_chat is None:
            is_chat = bool(getattr(self._lazy.tokenizer(), "chat_template", None))
        return LLMMetadata(
            context_window=window,
            num_output=self.max_new_tokens,
            is_chat_model=is_chat,
            model_name=self.model_name or self._lazy.source.loaded_name or DEMO_MODEL_NAME,
        )

    @property
    def generator(self) -> APEGenerator:
        """The generator behind this LLM; loads the model where that has not happened yet."""
        return self._lazy.get()

    def identity(self) -> str:
        """Tell apart LLMs whose states or stores differ, as far as that is known unloaded."""
        source = self._lazy.source
        store = "" if source.is_portable or source.store is None else f" in {id(source.store)}"
        return f"{self.metadata.model_name}{store}"

    def register_contexts(
        self,
        texts: Iterable[capturing.Context],
        query: str | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Make retrieved texts known, so that they are found in the next prompts.

        Parameters
        ----------
        texts : iterable of str, BaseNode or NodeWithScore
            Texts as they will stand in a prompt, or nodes, of which the text is known with and
            without its metadata.
        query : str, optional
            The query string that they were retrieved for.
        scores : mapping of str to float, optional
            Their retrieval scores by text, by which ``APEConfig.max_contexts`` chooses. None:
            those of the nodes.

        Raises
        ------
        ConfigError
            An argument is something else.
        """
        contexts = capturing.context_list(texts)
        _check_retrieval(query, scores)
        scores = capturing.context_scores(contexts) if scores is None else scores
        self._lazy.register(capturing.context_texts(contexts), query, scores)

    def prefetch(self, texts: Sequence[str], pipeline: Pipeline | None = None) -> None:
        """Start loading the model, and texts' states, in the background; returns at once.

        Parameters
        ----------
        texts : sequence of str
            Texts of the next prompt.
        pipeline : Pipeline, optional
            What is known of that prompt. Texts are encoded once a prompt of the pipeline was
            seen; before that, states that are already stored are brought to memory.
        """
        pipeline = pipeline or Pipeline()
        self._lazy.expect(pipeline, texts)
        if not self._lazy.is_loaded:
            self._lazy.load_in_background(lambda: self._prefetch(texts, pipeline))
        else:
            self._prefetch(texts, pipeline)

    def _prefetch(self, texts: Sequence[str], pipeline: Pipeline) -> None:
        from ape_integrations.llama_index.prefixes import shared_prefixes

        if pipeline.labelled:
            return
        if pipeline.prefix is not None:
            self.generator.prefetch(texts, pipeline.prefix)
            return
        for prefix in shared_prefixes(self):
            self.generator.prefetch(texts, prefix, encode=False)

    # Prompts and arguments ------------------------------------------------------------------------

    def render_messages(self, messages: Sequence[ChatMessage]) -> str:
        """Render a conversation as the model will read it, with at most one system message."""
        assert self.messages_to_prompt is not None
        return self.messages_to_prompt(with_system_prompt(messages, self.system_prompt))

    def render_completion(self, prompt: str, formatted: bool = False) -> str:
        """Render a completion prompt as the model will read it.

        Parameters
        ----------
        prompt : str
            Text to complete.
        formatted : bool
            Whether wrapper, system prompt and template have been applied already.
        """
        if formatted:
            return prompt
        assert self.completion_to_prompt is not None
        plain = self.completion_to_prompt is default_completion_to_prompt
        if plain and self.metadata.is_chat_model:
            if self.query_wrapper_prompt:
                prompt = self.query_wrapper_prompt.format(query_str=prompt)
            return self.render_messages([ChatMessage(role=MessageRole.USER, content=prompt)])
        return self._extend_prompt(self.completion_to_prompt(prompt))

    def render_template(self, template: BasePromptTemplate, **variables: Any) -> str:
        """Render a prompt template as ``predict`` would send it to the model."""
        if self.metadata.is_chat_model:
            return self.render_messages(self._get_messages(template, **variables))
        return self._get_prompt(template, **variables)

    def _arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        defaults = {"max_new_tokens": self.max_new_tokens, **self.generate_kwargs}
        arguments = generation_arguments(defaults, kwargs)
        if self.stopping_ids:
            own = arguments.get("eos_token_id", self.generator.model.generation_config.eos_token_id)
            own = own if isinstance(own, list) else [own]
            arguments["eos_token_id"] = [i for i in own if i is not None] + self.stopping_ids
        return arguments

    # Generation -----------------------------------------------------------------------------------

    def _generate(self, prompt: str, kwargs: dict[str, Any], *criteria: Any) -> GenerationResult:
        with clear_argument_errors():
            arguments = stopped_by(self._arguments(kwargs), *criteria)
            parts = self._lazy.split(prompt)
            return self.generator.generate(parts.prefix, parts.contexts, parts.query, **arguments)

    def _open(self, prompt: str, kwargs: dict[str, Any]) -> GenerationStream:
        with clear_argument_errors():
            arguments = self._arguments(kwargs)
            parts = self._lazy.split(prompt)
            return self.generator.stream(parts.prefix, parts.contexts, parts.query, **arguments)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Complete a prompt.

        Parameters
        ----------
        prompt : str
            Text to complete.
        formatted : bool
            Whether wrapper, system prompt and template have been applied already.
        **kwargs
            For this call: ``temperature`` (0 is greedy), ``max_new_tokens`` or ``max_tokens``,
            ``stop``, ``seed``, ``top_p``, ``do_sample`` and whatever ``generate()`` takes.

        Raises
        ------
        ConfigError
            An argument is out of range.
        ContextWindowError
            The prompt does not fit the model.
        """
        return completion(self._generate(self.render_completion(prompt, formatted), kwargs))

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Complete a prompt piece by piece, as for `complete`; closing it stops the model."""
        stream = self._open(self.render_completion(prompt, formatted), kwargs)
        return read(stream, completion_piece, completion)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation; arguments as for `complete`."""
        return chat_answer(self._generate(self.render_messages(messages), kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer piece by piece, as for `complete`; closing the stream stops the model."""
        stream = self._open(self.render_messages(messages), kwargs)
        return read(stream, chat_piece, chat_answer)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """Complete a prompt, as for `complete`; cancelling the task stops the model."""
        return completion(
            await run_generation(
                lambda stop: self._generate(self.render_completion(prompt, formatted), kwargs, stop)
            )
        )

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Complete a prompt piece by piece, as for `complete`; closing it stops the model."""
        stream = await run_generation(
            lambda _: self._open(self.render_completion(prompt, formatted), kwargs)
        )
        return aread(stream, completion_piece, completion)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation, as for `complete`; cancelling the task stops the model."""
        return chat_answer(
            await run_generation(
                lambda stop: self._generate(self.render_messages(messages), kwargs, stop)
            )
        )

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """Answer piece by piece, as for `complete`; closing the stream stops the model."""
        stream = await run_generation(lambda _: self._open(self.render_messages(messages), kwargs))
        return aread(stream, chat_piece, chat_answer)


def _config(
    ape_config: APEConfig | Mapping[str, Any] | None,
    attention_temperature: float | None,
    scaling_factor: float | None,
) -> APEConfig:
    """Put APE's settings together; a serialised LLM has them twice."""
    given = {"attention_temperature": attention_temperature, "scaling_factor": scaling_factor}
    given = {name: value for name, value in given.items() if value is not None}
    if ape_config is None:
        return APEConfig(**given)  # type: ignore[arg-type]
    config = ape_config if isinstance(ape_config, APEConfig) else _config_of(ape_config)
    doubled = [name for name, value in given.items() if value != getattr(config, name)]
    if doubled:
        raise ConfigError(f"ape_config and {', '.join(doubled)} say the same thing: pass one.")
    return config


def _refuse_besides_generator(**arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)} cannot be combined with generator: the generator has its own."
        )


def _by_name(what: str, given: Any, name: str | None) -> tuple[Any, str | None]:
    """Take a name where an object is expected for what it is."""
    if not isinstance(given, (str, Path)):
        return given, name
    if name is not None:
        raise ConfigError(f"{what} and {what}_name are both names: pass {what}_name alone.")
    return None, str(given)


def _refuse_settled(changes: Mapping[str, Any]) -> None:
    settled = [name for name in changes if name in _SETTLED]
    if settled:
        raise ConfigError(
            f"{', '.join(settled)} cannot change once an APELLM is made, because model, store and "
            "settings are shared by its copies. Make another APELLM."
        )


def _check_retrieval(query: Any, scores: Any) -> None:
    if query is not None and not isinstance(query, str):
        raise ConfigError(f"query must be a string, not {type(query).__name__}.")
    if scores is not None and not (
        isinstance(scores, Mapping)
        and all(isinstance(text, str) and isinstance(s, Real) for text, s in scores.items())
    ):
        raise ConfigError("scores must be a mapping of texts to numbers.")


def _config_of(values: Any) -> APEConfig:
    try:
        return APEConfig(**values)
    except TypeError as error:
        raise ConfigError(f"ape_config must be an APEConfig, or its values: {error}.") from error
