"""APEDocumentCompressor: registers documents where no retriever does, and warms the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from langchain_core.prompts import (
    BasePromptTemplate,
    ChatPromptTemplate,
    PromptTemplate,
    format_document,
)
from langchain_core.prompts.chat import MessagesPlaceholder
from langchain_core.runnables import RunnableBinding, RunnableParallel, RunnableSequence
from pydantic import ConfigDict, Field, model_validator
from tqdm.auto import tqdm

from ape_integrations.errors import ConfigError
from ape_integrations.langchain.chat_model import ChatAPE
from ape_integrations.langchain.documents import relevance_scores
from ape_integrations.langchain.engine import Engine
from ape_integrations.langchain.settings import APESettings

#: Variables that hold the documents in the prompts of LangChain's own chains.
_DOCUMENT_VARIABLES = ("context", "documents", "summaries", "text", "context_str", "docs")

#: Arguments of a call that decide which model reads which prompt.
_OF_THE_PROMPT = ("model", "tools", "tool_choice", "structured_output")

#: Stands for the question while a prompt is rendered ahead of time.
_QUESTION = "Which question will be asked of these documents?"

#: Documents that are put into one prompt while it is rendered ahead of time.
_AT_ONCE = 32


class APEDocumentCompressor(BaseDocumentCompressor, BaseDocumentTransformer):
    """Tells a model which documents it is about to read; what passes through stays as it is.

    Needed only where the automatic capture is off or sees nothing, because documents come from no
    LangChain retriever (``vectorstore.similarity_search``, a cache, a file). It must run last.
    Serves as the compressor of a ``ContextualCompressionRetriever`` and as
    ``retriever | compressor.transform_documents``.

    Parameters
    ----------
    model : ChatAPE or APELanguageModel
        The model that will read the documents, or what ``bind_tools``, ``with_structured_output``
        or ``bind`` made of it: tools are a part of the prompt, and so of what ``warm()`` stores.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model: Any
    bindings: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    """What was bound to ``model`` and decides which model reads which prompt."""

    @model_validator(mode="before")
    @classmethod
    def _take_bindings(cls, values: Any) -> Any:
        """Tell the model from what was bound to it."""
        if not isinstance(values, Mapping) or "model" not in values:
            return values
        model, bound = _unbound(values["model"])
        if not isinstance(model, APESettings):
            raise ConfigError(
                f"model must be a ChatAPE or an APELanguageModel, not {type(model).__name__}."
            )
        return {**values, "model": model, "bindings": {**values.get("bindings", {}), **bound}}

    @property
    def _engine(self) -> Engine:
        engine: Engine = self.model._engine_for(self.bindings.get("model"))[0]
        return engine

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Register documents and query; return the documents unchanged (no ``callbacks``)."""
        self._register(documents, query)
        return documents

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Register documents and query; return the documents unchanged (no ``callbacks``)."""
        return self.compress_documents(documents, query)

    def transform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """Register documents; return them unchanged."""
        self._register(documents, None)
        return documents

    async def atransform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """Register documents; return them unchanged."""
        return self.transform_documents(documents)

    def _register(self, documents: Sequence[Document], query: str | None) -> None:
        texts = [document.page_content for document in documents]
        self._engine.register(texts, query, relevance_scores(documents))

    # Ahead of time ------------------------------------------------------------------------------

    def warm(
        self,
        documents: Sequence[Document],
        prompt: BasePromptTemplate[Any] | str,
        *,
        document_variable: str | None = None,
        document_prompt: BasePromptTemplate[str] | None = None,
        show_progress: bool = True,
    ) -> dict[str, int]:
        """Encode and store documents before the first question.

        The prompt is rendered just as a request would render it, with a made-up question, and
        taken apart in the same way, so that requests find the very same entries.

        Parameters
        ----------
        documents : sequence of Document
        prompt : ChatPromptTemplate, PromptTemplate or str
            The chain's prompt; or, as a string, the prefix itself, up to the first document.
        document_variable : str, optional
            The prompt's variable that takes the documents, where it has none of the usual names.
        document_prompt : BasePromptTemplate, optional
            How the chain writes each document, where it adds something to ``page_content``.
        show_progress : bool
            Show a progress bar.

        Returns
        -------
        dict
            ``contexts``, ``hits`` (stored already) and ``misses`` (encoded now).

        Raises
        ------
        ConfigError
            The prompt has no variable for the text of documents, or is no prompt but a chain; or
            something else than Documents is to be warmed.
        """
        documents = list(documents)
        _check_documents(documents)
        template = document_prompt or PromptTemplate.from_template("{page_content}")
        variable = None
        if not isinstance(prompt, str):
            variable = _document_variable(prompt, document_variable)
        generator = self._engine.generator
        counts = {"contexts": 0, "hits": 0, "misses": 0}
        with tqdm(total=len(documents), unit="doc", disable=not show_progress) as progress:
            progress.set_description("Warming the store")
            for start in range(0, len(documents), _AT_ONCE):
                some = documents[start : start + _AT_ONCE]
                texts = [format_document(document, template) for document in some]
                # Some at a time: the registry forgets the oldest of very many.
                generator.registry.register([d.page_content for d in some], _QUESTION)
                prefix, contexts = self._parts(prompt, texts, variable)
                done = generator.warm(prefix, contexts, show_progress=False)
                counts = {name: counts[name] + done[name] for name in counts}
                progress.update(len(some))
        return counts

    def _parts(
        self, prompt: BasePromptTemplate[Any] | str, texts: Sequence[str], variable: str | None
    ) -> tuple[str, Sequence[str]]:
        """Return prefix and contexts as requests with these documents will have them."""
        if isinstance(prompt, str) or variable is None:
            return str(prompt), texts
        value = prompt.invoke(_arguments(prompt, variable, "\n\n".join(texts)))
        if isinstance(self.model, ChatAPE):
            rendered = self.model._prepare(value.to_messages(), None, self.bindings).prompt
        else:
            rendered = value.to_string()
        parts = self._engine.generator.split(rendered)
        return parts.prefix, parts.contexts


def _unbound(model: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model without its bindings, and of these what shapes the prompt."""
    bound: dict[str, Any] = {}
    while isinstance(model, (RunnableBinding, RunnableSequence, RunnableParallel)):
        if isinstance(model, RunnableBinding):
            bound = {**model.kwargs, **bound}
            model = model.bound
        elif isinstance(model, RunnableSequence):  # a model and the parser of its answers
            model = model.first
        elif len(model.steps__) == 1:  # a model whose raw answers are kept
            (model,) = model.steps__.values()
        else:
            break
    return model, {name: bound[name] for name in _OF_THE_PROMPT if name in bound}


def _check_documents(documents: Sequence[Document]) -> None:
    for document in documents:
        if not isinstance(document, Document):
            raise ConfigError(
                f"documents must be a list of Documents, but a {type(document).__name__} is in "
                "it: pass Document(page_content=...) for a text."
            )


def _document_variable(prompt: BasePromptTemplate[Any], given: str | None) -> str:
    if not isinstance(prompt, BasePromptTemplate):
        raise ConfigError(
            f"prompt must be the chain's prompt template, or a prefix as a string, not "
            f"{type(prompt).__name__}: of a chain, pass the prompt alone."
        )
    names = set(prompt.input_variables)
    found = given or next((name for name in _DOCUMENT_VARIABLES if name in names), None)
    if found not in names:
        raise ConfigError(
            f"The prompt has no variable {given or 'for documents'}: it has "
            f"{', '.join(sorted(names)) or 'none'}. Name it in document_variable."
        )
    if found in _histories(prompt):
        raise ConfigError(
            f"{found} takes messages (a MessagesPlaceholder), but documents are warmed as text: "
            'pass a prompt that has them in a message, such as ("system", "...{context}").'
        )
    return found


def _histories(prompt: BasePromptTemplate[Any]) -> set[str]:
    """Return the variables that take messages."""
    messages = prompt.messages if isinstance(prompt, ChatPromptTemplate) else []
    return {m.variable_name for m in messages if isinstance(m, MessagesPlaceholder)}


def _arguments(prompt: BasePromptTemplate[Any], variable: str, documents: str) -> dict[str, Any]:
    """Return a value for each variable: no history, and a made-up question."""
    histories = _histories(prompt)
    values: dict[str, Any] = {
        name: [] if name in histories else _QUESTION for name in prompt.input_variables
    }
    return {**values, variable: documents}
