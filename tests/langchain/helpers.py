"""A retriever, documents and tiny models for pipelines."""

from __future__ import annotations

import json
import re
import threading
from functools import cache
from typing import Any

import torch
from langchain_core.callbacks import BaseCallbackHandler, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.retrievers import BaseRetriever
from torch import Tensor
from transformers import LogitsProcessor

from ape_integrations import APEGenerator, ChatAPE, MemoryKVStore
from tests.models import byte_tokenizer, tiny_model

TEXTS = (
    "The lighthouse of Aldor is forty metres tall. It was built by Mira Vane.",
    "Mira Vane was born in Selby. She drew maps before she built lighthouses.",
    "The harbour of Selby closes in winter.\n\nIts ferry sails again in April.",
    "Aldor lies at the mouth of the river Tarn. Ferries cross it every hour.",
    "The river Tarn rises in the hills of Orrin. It never freezes.",
    "Orrin is known for apples. Its market is held on the first Monday.",
)
DOCUMENTS = tuple(Document(text, metadata={"source": f"{i}.txt"}) for i, text in enumerate(TEXTS))
QUESTIONS = (
    "How tall is the lighthouse of Aldor?",
    "Where was Mira Vane born?",
    "When does the ferry of Selby sail again?",
    "Which river flows past Aldor?",
    "Where does the river Tarn rise?",
    "What is Orrin known for?",
    "Does the Tarn freeze in winter?",
    "Who drew maps before building lighthouses?",
)


class WordRetriever(BaseRetriever):
    """Returns the documents that share most words with a query."""

    k: int = 3
    documents: tuple[Document, ...] = DOCUMENTS

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        words = _words(query)
        return sorted(
            self.documents, key=lambda d: len(words & _words(d.page_content)), reverse=True
        )[: self.k]


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}


def format_docs(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


# Models ------------------------------------------------------------------------------------------

TOOL_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
    "{% endif %}"
    "{% if system or tools %}<|im_start|>system\n{{ system }}"
    "{% if tools %}\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}'
    "<|im_end|>\n{% endif %}"
    "{% for m in rest %}"
    "{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n"
    "</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}\n<tool_call>\n{{ call['function'] | tojson }}\n"
    "</tool_call>{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def loaded_model() -> Any:
    model = tiny_model(max_position_embeddings=8192)
    # Letters only, and no end, so that each token is a character that is shown at once.
    vocabulary = loaded_tokenizer().get_vocab()
    silent = [
        i
        for token, i in vocabulary.items()
        if not (len(token) == 1 and token.isascii() and token.isalpha())
    ]
    unused = range(len(vocabulary), model.config.vocab_size)
    model.generation_config.suppress_tokens = sorted({*silent, *unused})
    return model


@cache
def loaded_tokenizer(tools: bool = False) -> Any:
    tokenizer = byte_tokenizer()
    if tools:
        tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def tiny_chat(*, tools: bool = False, **kwargs: Any) -> ChatAPE:
    """Return a chat model with a store of its own."""
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 8, **kwargs}
    if "store" not in settings and "cache_dir" not in settings:
        settings["store"] = MemoryKVStore()
    return ChatAPE(model=loaded_model(), tokenizer=loaded_tokenizer(tools), **settings)


def reference_generator(tools: bool = False) -> APEGenerator:
    """Return a generator that nothing was captured for."""
    return APEGenerator(loaded_model(), loaded_tokenizer(tools), store=MemoryKVStore())


class Script(LogitsProcessor):
    """Makes a model say what a function of the prompt returns; elsewhere it says a few tokens.

    Parameters
    ----------
    say : callable
        Given the prompt, returns the answer or None.
    """

    own_tokens = 8

    def __init__(self, say: Any, tokenizer: Any) -> None:
        self._say = say
        self._tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        text = self._tokenizer.decode(input_ids[0], clean_up_tokenization_spaces=False)
        prompt, _, answer = text.rpartition("<|im_start|>assistant\n")
        wanted = self._say(prompt)
        if wanted is None and len(answer) < self.own_tokens:
            return scores
        wanted = wanted if wanted is not None and wanted.startswith(answer) else answer
        rest = wanted[len(answer) :]
        token = self._tokenizer(rest, add_special_tokens=False)["input_ids"][0] if rest else 2
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)


def searching_chat(**kwargs: Any) -> ChatAPE:
    """Return a chat model that calls the tool ``search`` before it answers by itself."""

    def say(prompt: str) -> str | None:
        if "<tool_response>" in prompt or "# Tools" not in prompt:
            return None
        question = prompt.rpartition("<|im_start|>user\n")[2].removesuffix("<|im_end|>\n")
        query = json.dumps(question.split()[-1].strip("?"))
        return f'<tool_call>\n{{"name": "search", "arguments": {{"query": {query}}}}}\n</tool_call>'

    script = Script(say, loaded_tokenizer(True))
    return tiny_chat(
        tools=True, max_tokens=120, model_kwargs={"logits_processor": [script]}, **kwargs
    )


# What happened -----------------------------------------------------------------------------------


class Calls(BaseCallbackHandler):
    """Collects what the cache did in every call of a model, and what was answered."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self._lock = threading.Lock()

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        generation = response.generations[0][0]
        if isinstance(generation, ChatGeneration):
            report = generation.message.response_metadata["ape"]
        else:
            report = (generation.generation_info or {})["ape"]
        with self._lock:
            self.reports.append(report)
            self.texts.append(generation.text)

    @property
    def reading(self) -> list[dict[str, Any]]:
        """Reports of the calls that read contexts."""
        return [report for report in self.reports if report["contexts"]]

    def total(self, name: str) -> int:
        return sum(report[name] for report in self.reports)
