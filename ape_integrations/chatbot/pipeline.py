"""What a chatbot asks of a framework's pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ape_integrations.chatbot.files import Passage

if TYPE_CHECKING:
    from ape_integrations.chatbot.conversation import Turn
    from ape_integrations.core.generator import APEGenerator


class Pipeline(ABC):
    """Reads files, finds passages and answers from them, by the means of one framework.

    Used by several threads at once.
    """

    framework: ClassVar[str]
    """Name of the framework."""

    @property
    @abstractmethod
    def generator(self) -> APEGenerator:
        """The generator behind the model; the first use loads the model."""

    @abstractmethod
    def read(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yield the texts that a file is cut into, each with the label of its page or ``""``."""

    @abstractmethod
    def index(self, passages: Sequence[Passage]) -> None:
        """Make passages, at least one, those that answers are found in from now on."""

    @abstractmethod
    def warm(self, passages: Sequence[Passage]) -> None:
        """Encode passages that the store lacks, behind the prefix that prompts will have."""

    @abstractmethod
    def answer(self, turn: Turn, history: Sequence[Turn]) -> Iterator[str]:
        """Yield an answer piece by piece; closing the iterator stops the model.

        Fills ``passages`` and ``prompt`` of the turn before the first piece, ``report`` after the
        last one.

        Parameters
        ----------
        turn : Turn
            Holds the question.
        history : sequence of Turn
            Earlier turns, oldest first.
        """


def with_carried(found: Sequence[Passage], history: Sequence[Turn]) -> list[Passage]:
    """Return what was found for a question, and the best passage of the question before it.

    "And where is its office?" finds little by itself; what it is about stands in that passage,
    whose states are at hand.
    """
    carried = history[-1].passages[:1] if history else []
    return [*found, *(passage for passage in carried if passage not in found)]
