"""The shared prefix of a pipeline's prompts, found by rendering one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.prompts import BasePromptTemplate, SelectorPromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptMixin
from llama_index.core.query_engine import CitationQueryEngine, ToolRetrieverRouterQueryEngine

from ape_integrations.errors import ConfigError

if TYPE_CHECKING:
    from ape_integrations.llama_index.llm import APELLM

#: What stands for a retrieved text and for a question while a prompt is rendered.
_CONTEXT = "These words stand where a retrieved text will stand in the prompt of a pipeline."
_QUERY = "Which words stand where the question of a user will stand in the prompt?"
_OTHER = "These words stand for something else that changes from one request to the next."

#: Variables of LlamaIndex's templates that hold retrieved text, or the question.
_CONTEXT_VARIABLES = ("context_str", "context_msg", "context", "context_messages")
_QUERY_VARIABLES = ("query_str", "query", "question")

#: Names of the templates with which a synthesizer asks first.
_TEMPLATES = ("text_qa_template", "summary_template")


def shared_prefixes(llm: APELLM, prompt: Any = None) -> list[str]:
    """Return the prefixes behind which a pipeline's prompts put retrieved texts.

    Parameters
    ----------
    llm : APELLM
        Renders and splits as it does for a request.
    prompt : optional
        A prompt template, a query engine or response synthesizer, a chat engine, a prefix as a
        string, or a sequence of these. None: LlamaIndex's default question-answering prompt.

    Raises
    ------
    ConfigError
        Something else, a template without a variable for retrieved text, or an engine whose
        prompts cannot be known before it retrieves.
    """
    if prompt is None:
        prompt = DEFAULT_TEXT_QA_PROMPT_SEL
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, Sequence):
        found = [prefix for one in prompt for prefix in shared_prefixes(llm, one)]
        return list(dict.fromkeys(found))
    return list(dict.fromkeys(_prefix(llm, template) for template in _templates(prompt)))


def _templates(prompt: Any) -> list[BasePromptTemplate]:
    if isinstance(prompt, BasePromptTemplate):
        return [prompt]
    if isinstance(prompt, BaseChatEngine):
        # A chat engine builds its synthesizer anew for every message and shows it nowhere else.
        synthesizer = getattr(prompt, "_get_response_synthesizer", None)
        if synthesizer is None:
            raise ConfigError(
                f"The prompts of {type(prompt).__name__} are not known: pass its query engine, "
                "its prompt template, or the prefix as a string."
            )
        prompt = synthesizer([])
    _refuse_unforeseeable(prompt)
    if isinstance(prompt, BaseQueryEngine) and (inner := _inner_engines(prompt)):
        return [template for engine in inner for template in _templates(engine)]
    if isinstance(prompt, PromptMixin):
        prompts = prompt.get_prompts()
        templates = [prompts[name] for name in prompts if name.rpartition(":")[2] in _TEMPLATES]
        if templates:
            return templates
    raise ConfigError(
        f"{type(prompt).__name__} is no source of prompts: pass a prompt template, a query "
        "engine, a chat engine, a response synthesizer or the prefix as a string."
    )


def _refuse_unforeseeable(prompt: Any) -> None:
    if isinstance(prompt, CitationQueryEngine):
        raise ConfigError(
            "A CitationQueryEngine cuts nodes anew and writes 'Source 1:' and so on into them, by "
            "their rank for a question: its texts cannot be encoded before they are retrieved. "
            "They are kept once a question was asked."
        )
    if isinstance(prompt, ToolRetrieverRouterQueryEngine):
        raise ConfigError(
            "A ToolRetrieverRouterQueryEngine retrieves its engines for each question: pass a "
            "list of the engines that it may find."
        )


def _inner_engines(engine: BaseQueryEngine) -> list[Any]:
    """Return the engines that an engine passes questions on to: their prompts hold the nodes."""
    # No public name leads to them.
    many, one = getattr(engine, "_query_engines", ()), getattr(engine, "_query_engine", None)
    engines = [*(many.values() if isinstance(many, Mapping) else many), one]
    return [inner for inner in engines if isinstance(inner, BaseQueryEngine)]


def _prefix(llm: APELLM, template: BasePromptTemplate) -> str:
    if isinstance(template, SelectorPromptTemplate):
        template = template.select(llm)
    mapped = {own: given for given, own in (template.template_var_mappings or {}).items()}
    names = [mapped.get(n, n) for n in template.template_vars if n not in template.kwargs]
    names = [name for name in names if name not in template.kwargs]
    if not any(name in _CONTEXT_VARIABLES for name in names):
        raise ConfigError(
            f"The prompt has no variable for retrieved text (it has: {', '.join(names) or 'none'}"
            f"). Name it {_CONTEXT_VARIABLES[0]}."
        )
    llm.register_contexts([_CONTEXT], _QUERY)
    llm.register_contexts([], _OTHER)
    rendered = llm.render_template(template, **{name: _stand_in(name) for name in names})
    return llm.generator.split(rendered).prefix


def _stand_in(name: str) -> Any:
    if name == "context_messages":
        return [ChatMessage(content=_CONTEXT)]
    if name in _CONTEXT_VARIABLES:
        return _CONTEXT
    return _QUERY if name in _QUERY_VARIABLES else _OTHER
