"""Rendered prompt -> prefix, contexts and query."""

from __future__ import annotations

import logging
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ape_integrations.core.guard import GUARD, unguarded
from ape_integrations.core.labels import Division, Labels
from ape_integrations.core.markup import ChatMarkup
from ape_integrations.core.matching import Found, find_contexts
from ape_integrations.core.registry import ContextRegistry
from ape_integrations.core.shapes import has_words
from ape_integrations.core.stable_prefix import PrefixMemory

logger = logging.getLogger(__name__)

# A last line, with rules under it, that holds nothing but a label: "Context: ",
# "Documents:\n-----\n"
_LEAD = re.compile(r"^[ \t]*(?:[^\W\d_]+ ){0,3}[^\W\d_]+:[\W_]*\Z", re.MULTILINE)


@dataclass(frozen=True)
class PromptParts:
    """A prompt, taken apart.

    Attributes
    ----------
    prefix : str
        Text that every context follows; the same from request to request. May be empty.
    contexts : tuple of str
        Retrieved texts with their labels, in order of appearance; a repeated one is kept once.
    query : str
        Everything else, in order.
    moved : bool
        Whether text from before the contexts was moved into the query.
    """

    prefix: str
    contexts: tuple[str, ...]
    query: str
    moved: bool = False


class PromptSplitter:
    """Finds registered texts in rendered prompts and takes the prompts apart around them.

    The prefix is the part before the contexts that stays the same from request to request, because
    every context is stored under it. Thread-safe. Deterministic: the same prompts in the same order
    give the same parts, and a prompt asked again with the same text before its contexts gives the
    same prefix.

    Parameters
    ----------
    registry : ContextRegistry
        Retrieved texts and query strings.
    reorder : bool
        Whether the varying part of what precedes the contexts moves into the query. Without it the
        order of the prompt is kept, and states are reused only where the question comes last.
    special_tokens : sequence of str
        The tokenizer's special tokens; see `ape_integrations.core.chat.template_special_tokens`.
    turn_markers : mapping of str to str, optional
        Message headers by role; see `ape_integrations.core.chat.turn_markers`.
    """

    def __init__(
        self,
        registry: ContextRegistry,
        *,
        reorder: bool = True,
        special_tokens: Sequence[str] = (),
        turn_markers: Mapping[str, str] | None = None,
    ) -> None:
        self._registry = registry
        self._reorder = reorder
        self._markup = ChatMarkup(special_tokens, turn_markers)
        self._labels = Labels(self._markup)
        self._prefixes = PrefixMemory(self._markup)
        self._told = threading.Event()

    def split(self, prompt: str) -> PromptParts:
        """Take a prompt apart.

        Parameters
        ----------
        prompt : str
            Rendered text, special tokens included. Guards (see `ape_integrations.core.guard`) stay
            in prefix and query.

        Returns
        -------
        PromptParts
            Without a registered text in the prompt: no contexts, and the prompt as the query.
        """
        spans = self._find(prompt)
        if not spans:
            return PromptParts("", (), prompt)
        between = [prompt[end:start] for (_, end), (start, _) in pairwise(spans)]
        head, tail = prompt[: spans[0][0]], prompt[spans[-1][1] :]
        division = self._labels.divide(head, between, tail, self._registry.queries(prompt))
        moved = [index for index, gap in enumerate(division.gaps) if gap.moved.strip()]
        if moved and not self._reorder:
            # A conversation between two contexts cannot stay where it is: it ends the contexts.
            spans, gaps = spans[: moved[0] + 1], division.gaps
            trailer = len(gaps[moved[0]].trailer)
            division = Division(division.first_label, gaps[: moved[0]], trailer)
        return self._assemble(prompt, spans, division)

    def _find(self, prompt: str) -> list[tuple[int, int]]:
        """Find contexts; a guard inside one does not hide it."""
        if GUARD not in prompt:
            return self._counted(find_contexts(prompt, self._registry, self._markup))
        spans = self._counted(find_contexts(unguarded(prompt), self._registry, self._markup))
        found = (match.start() for match in re.finditer(GUARD, prompt))
        guards = [position - number for number, position in enumerate(found)]
        return [
            (start + bisect_right(guards, start), end + bisect_left(guards, end))
            for start, end in spans
        ]

    def _counted(self, found: Found) -> list[tuple[int, int]]:
        """Return what was found; say once where text was retrieved and none of it counts."""
        if found.overlooked and not found.spans and not self._told.is_set():
            self._told.set()
            logger.warning(
                "Retrieved text stands in the middle of other text of a prompt, where it is no "
                "context of its own, and is prefilled as always. Put it on lines of its own to "
                "have its states reused."
            )
        return found.spans

    def _assemble(
        self, prompt: str, spans: list[tuple[int, int]], division: Division
    ) -> PromptParts:
        first, last, gaps = spans[0][0], spans[-1][1], division.gaps
        labels = [division.first_label, *(len(gap.label) for gap in gaps)]
        trailers = [*(len(gap.trailer) for gap in gaps), division.last_trailer]
        contexts = (
            unguarded(prompt[start - label : end + trailer])
            for (start, end), label, trailer in zip(spans, labels, trailers, strict=True)
        )
        head, tail = prompt[: first - labels[0]], prompt[last + trailers[-1] :]
        prefix, rest = self._divide_head(head, tail)
        query = rest + "".join(gap.moved for gap in gaps) + tail
        return PromptParts(prefix, tuple(dict.fromkeys(contexts)), query, moved=bool(rest))

    def _divide_head(self, head: str, tail: str) -> tuple[str, str]:
        """Divide the text before the contexts into the prefix and what moves into the query."""
        if not self._reorder:
            return head, ""
        cut = self._prefixes.cut(head, tail, self._registry.queries(head))
        if not has_words(head[cut:]):
            return head, ""
        # "Question: ...\nContext: ": the line that leads to the contexts stays with them.
        lead = None if self._markup.has_token(head[cut:]) else _LEAD.search(head, cut)
        start = lead.start() if lead and lead.start() > cut else len(head)
        return head[:cut] + head[start:], head[cut:start]
