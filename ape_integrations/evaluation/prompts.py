"""From records to prompts: prefix, contexts and query, rendered for the model at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ape_integrations.core.chat import render_chat
from ape_integrations.core.guard import guarded
from ape_integrations.errors import ConfigError
from ape_integrations.evaluation.records import Record

QUESTION_TEMPLATE = (
    "Answer the question from the documents below. "
    "Give the answer alone, as short as it can be.\n\n"
    "{contexts}\n\nQuestion: {question}\nAnswer:"
)
FEW_SHOT_TEMPLATE = (
    "Answer the last question as the examples do.\n\n{contexts}\n\nQuestion: {question}\nAnswer:"
)
_GAP = "\ufdd1"  # a Unicode noncharacter, which no text needs


@dataclass(frozen=True)
class Case:
    """One prompt in its parts, with the answers that count as right.

    Parameters
    ----------
    task : str
        What it belongs to; cases of one task and number of documents are one row of a table.
    documents : int or None
        Number of documents, where all cases of a row have the same.
    prefix, query : str
        Rendered text before and behind the contexts, special tokens included.
    contexts : tuple of str
        Texts of the contexts.
    answers : tuple of str
        Accepted answers.
    """

    task: str
    documents: int | None
    prefix: str
    contexts: tuple[str, ...]
    query: str
    answers: tuple[str, ...]

    def sequential(self, separator: str, special_tokens: Sequence[str]) -> str:
        """Return the prompt as one text; special tokens in contexts become plain characters."""
        contexts = [guarded(text, special_tokens) for text in self.contexts]
        return self.prefix + separator.join(contexts) + self.query

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell this case from any other."""
        parts = (self.prefix, *self.contexts, self.query, *self.answers)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class PromptTemplate:
    """The form of a prompt.

    Parameters
    ----------
    question, few_shot : str
        Text with ``{contexts}`` once and ``{question}``, for either kind of record.
    system : str, optional
        System message.
    chat : bool
        Whether to use the tokenizer's chat template, where it has one. Otherwise the text itself
        is the prompt, to be continued.

    Raises
    ------
    ConfigError
        A template lacks one of the two, or has contexts twice.
    """

    question: str = QUESTION_TEMPLATE
    few_shot: str = FEW_SHOT_TEMPLATE
    system: str | None = None
    chat: bool = True

    def __post_init__(self) -> None:
        for text in (self.question, self.few_shot):
            if text.count("{contexts}") != 1 or "{question}" not in text:
                raise ConfigError("A template needs {contexts} exactly once, and {question}.")

    def case(self, tokenizer: Any, task: str, record: Record) -> Case:
        """Render a record's prompt.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
            Its chat template and special tokens are used.
        task : str
            Name of the row.
        record : Record
            What to ask.
        """
        template = self.few_shot if record.few_shot else self.question
        before, behind = template.split("{contexts}")
        text = before.replace("{question}", record.question) + _GAP
        text += behind.replace("{question}", record.question)
        if self.renders_chat(tokenizer):
            messages = [{"role": "user", "content": text}]
            if self.system:
                messages.insert(0, {"role": "system", "content": self.system})
            rendered = render_chat(tokenizer, messages)
        else:
            rendered = guarded(text, tokenizer.all_special_tokens)
            rendered = f"{self.system}\n\n{rendered}" if self.system else rendered
        prefix, _, query = rendered.partition(_GAP)
        return Case(task, None, prefix, record.contexts, query, record.answers)

    def renders_chat(self, tokenizer: Any) -> bool:
        """Whether prompts go through the tokenizer's chat template."""
        return self.chat and bool(tokenizer.chat_template)
