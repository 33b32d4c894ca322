"""Texts that a pipeline retrieved, indexed so that they are found again inside a prompt."""

from __future__ import annotations

import html
import json
import re
import threading
from bisect import bisect_right, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_HEAD = 12  # characters that choose a bucket; a text shorter than this is looked up whole


class _Bucket:
    """Texts with one head, sorted, each knowing the longest other text that it starts with.

    Pipelines that put metadata first give thousands of texts the same head, so that comparing all
    of them at every candidate position is not an option; a binary search is.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._parents: list[int] | None = None
        self._longest = 0

    def add(self, text: str) -> None:
        insort(self.texts, text)
        self._parents = None

    def remove(self, text: str) -> None:
        del self.texts[bisect_right(self.texts, text) - 1]
        self._parents = None

    def _link(self) -> list[int]:
        parents: list[int] = []
        chain: list[int] = []  # the sorted neighbours that are prefixes of each other
        for text in self.texts:
            while chain and not text.startswith(self.texts[chain[-1]]):
                chain.pop()
            parents.append(chain[-1] if chain else -1)
            chain.append(len(parents) - 1)
        self._longest = max(map(len, self.texts), default=0)
        return parents

    def at(self, prompt: str, position: int) -> list[str]:
        """Texts that the prompt continues with at a position, longest first."""
        found = []
        if self._parents is None:
            self._parents = self._link()
        window = prompt[position : position + self._longest]
        # A text that starts the window sorts before it, and everything sorted between the two
        # starts with that text as well: following the parents from the nearest neighbour meets
        # them all.
        index = bisect_right(self.texts, window) - 1
        while index >= 0:
            if window.startswith(self.texts[index]):
                found.append(self.texts[index])
            index = self._parents[index]
        return found


class TextIndex:
    """Texts, and which of them stand at a position of a prompt. Not thread-safe."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._short: Counter[int] = Counter()
        self._short_lengths: list[int] = []
        self._members: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Add a text; adding it n times needs n removals."""
        self._members[text] += 1
        if self._members[text] > 1:
            return
        if len(text) < _HEAD:
            self._count_short(text, 1)
        else:
            self._buckets.setdefault(text[:_HEAD], _Bucket()).add(text)

    def remove(self, text: str) -> None:
        """Undo one `add` of a text that is a member."""
        self._members[text] -= 1
        if self._members[text] > 0:
            return
        del self._members[text]
        if len(text) < _HEAD:
            self._count_short(text, -1)
            return
        bucket = self._buckets[text[:_HEAD]]
        bucket.remove(text)
        if not bucket.texts:
            del self._buckets[text[:_HEAD]]

    def at(self, prompt: str, position: int) -> list[str]:
        """Texts that the prompt continues with at a position, longest first."""
        bucket = self._buckets.get(prompt[position : position + _HEAD])
        found = [] if bucket is None else bucket.at(prompt, position)
        for length in self._short_lengths:
            text = prompt[position : position + length]
            if len(text) == length and text in self._members:
                found.append(text)
        return found

    def _count_short(self, text: str, change: int) -> None:
        self._short[len(text)] += change
        self._short = +self._short
        self._short_lengths = sorted(self._short, reverse=True)


@dataclass(frozen=True)
class _Form:
    """A way in which templates rewrite a text before it reaches the prompt."""

    name: str
    marker: re.Pattern[str]  # what a prompt that holds such texts must contain
    rewrite: Callable[[str], str]


def _mustache(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace('"', "&quot;")
    return escaped.replace("<", "&lt;").replace(">", "&gt;")


def _literal(text: str) -> str:
    # The list may hold one string that joins many texts, so that its quotes are not this text's own
    # choice: a double quote put in front makes every single quote an escaped one.
    return repr('"' + text)[2:-1]


_ESCAPE = re.compile(r"\\[nrtu\"'\\]")
_FORMS = (
    _Form("mustache", re.compile(r"&(?:amp|quot|lt|gt);"), _mustache),
    _Form("html", re.compile(r"&(?:amp|quot|lt|gt|#x27);"), html.escape),
    _Form("json", _ESCAPE, lambda text: json.dumps(text, ensure_ascii=False)[1:-1]),
    _Form("ascii json", _ESCAPE, lambda text: json.dumps(text)[1:-1]),
    _Form("python list", _ESCAPE, _literal),
    _Form("python list in double quotes", _ESCAPE, lambda text: _literal(text).replace("\\'", "'")),
)


def _score(context: str, known: Mapping[str, float]) -> float | None:
    """Return the score of a context's text, which may have a label around it."""
    text = context.strip()
    if text in known:
        return known[text]
    inside = [other for other in known if other in text]
    return known[max(inside, key=len)] if inside else None


class ContextRegistry:
    """Retrieved texts and recent query strings, shared by the threads of one process.

    Texts are kept without edge whitespace, because templates and chat templates trim it. Besides
    its plain form a text is found in the forms that templates rewrite it to (HTML escapes of
    mustache templates, JSON strings of tool messages, the literals of a Python list); these are
    indexed when a prompt first shows signs of them. Nothing is remembered across processes.

    Parameters
    ----------
    max_texts : int
        Texts kept; the least recently registered ones leave first.
    max_queries : int
        Query strings kept, and retrievals whose scores are known, likewise.
    """

    def __init__(self, max_texts: int = 20_000, max_queries: int = 256) -> None:
        self._max_texts = max_texts
        self._max_queries = max_queries
        self._lock = threading.RLock()
        self._reset()

    def _reset(self) -> None:
        self._texts: OrderedDict[str, None] = OrderedDict()
        self._queries: OrderedDict[str, None] = OrderedDict()
        self._scores: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._index = TextIndex()
        self._forms: list[_Form] = []  # those indexed so far

    def __len__(self) -> int:
        return len(self._texts)

    def clear(self) -> None:
        """Forget all texts and queries."""
        with self._lock:
            self._reset()

    def register(
        self,
        texts: Iterable[str],
        query: str | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Remember retrieved texts, and the query string they were retrieved for.

        Parameters
        ----------
        texts : iterable of str
            Texts as the pipeline will put them into its prompt. Blank ones are ignored.
        query : str, optional
            The query string as it will appear in the prompt. It tells the varying part of a prompt
            from the constant one, from the first request on.
        scores : mapping of str to float, optional
            Retrieval scores by text; the higher, the better. Only those of one retrieval are ever
            compared.
        """
        stripped = [text.strip() for text in texts]
        with self._lock:
            for text in stripped:
                if text in self._texts:
                    self._texts.move_to_end(text)
                elif text:
                    self._add(text)
            if query and query.strip():
                self._queries[query.strip()] = None
                self._queries.move_to_end(query.strip())
                while len(self._queries) > self._max_queries:
                    self._queries.popitem(last=False)
            if scores:
                name = (query or "").strip()
                self._scores[name] = {text.strip(): score for text, score in scores.items()}
                self._scores.move_to_end(name)
                while len(self._scores) > self._max_queries:
                    self._scores.popitem(last=False)

    def knows(self, texts: Iterable[str]) -> bool:
        """Tell whether all these texts are registered; they then count as registered just now."""
        stripped = [text.strip() for text in texts]
        with self._lock:
            known = all(text in self._texts for text in stripped if text)
            for text in stripped if known else ():
                if text:
                    self._texts.move_to_end(text)
        return known

    def scores(self, contexts: Sequence[str], query: str) -> list[float] | None:
        """Return the retrieval score of each context, where one retrieval gave them all.

        Parameters
        ----------
        contexts : sequence of str
            Texts as a prompt has them, labels included.
        query : str
            What stands behind them. Retrievals whose query string it contains come first, then
            the latest.

        Returns
        -------
        list of float or None
            None where no retrieval is known that has a score for every context.
        """
        with self._lock:
            retrievals = [(name, dict(scores)) for name, scores in reversed(self._scores.items())]
        retrievals.sort(key=lambda retrieval: retrieval[0] not in query)
        for _, known in retrievals:
            found = [_score(context, known) for context in contexts]
            scores = [score for score in found if score is not None]
            if len(scores) == len(contexts):
                return scores
        return None

    def queries(self, prompt: str = "") -> tuple[str, ...]:
        """Recent query strings, the latest last; also as a prompt's template may rewrite them."""
        with self._lock:
            queries = tuple(self._queries)
        forms = [form for form in _FORMS if form.marker.search(prompt)]
        written = (form.rewrite(query) for form in forms for query in queries)
        return tuple(dict.fromkeys([*queries, *written]))

    def texts_at(self, prompt: str, position: int) -> list[str]:
        """Return the registered texts that a prompt continues with at a position."""
        with self._lock:
            return self._index.at(prompt, position)

    def find(
        self, prompt: str, positions: Iterable[int], accept: Callable[[int, int], bool]
    ) -> list[tuple[int, int]]:
        """Occurrences of registered texts in a prompt, leftmost-longest, without overlaps.

        Parameters
        ----------
        prompt : str
        positions : iterable of int
            Where a text may begin, ascending.
        accept : callable
            Called with start and end of an occurrence; a refused one gives way to a shorter text.

        Returns
        -------
        list of (int, int)
            Start and end of every accepted occurrence, ascending.
        """
        found: list[tuple[int, int]] = []
        end = 0
        with self._lock:
            self._index_forms(prompt)
            for position in positions:
                if position < end:
                    continue
                for text in self._index.at(prompt, position):
                    if accept(position, position + len(text)):
                        end = position + len(text)
                        found.append((position, end))
                        break
        return found

    def _add(self, text: str) -> None:
        self._texts[text] = None
        for written in self._written(text, self._forms):
            self._index.add(written)
        self._index.add(text)
        if len(self._texts) > self._max_texts:
            oldest, _ = self._texts.popitem(last=False)
            for written in self._written(oldest, self._forms):
                self._index.remove(written)
            self._index.remove(oldest)

    def _index_forms(self, prompt: str) -> None:
        """Index all texts in the forms that a prompt shows signs of for the first time."""
        new = [f for f in _FORMS if f not in self._forms and f.marker.search(prompt)]
        for text in self._texts if new else ():
            for written in self._written(text, new):
                self._index.add(written)
        self._forms += new

    @staticmethod
    def _written(text: str, forms: list[_Form]) -> list[str]:
        written = (form.rewrite(text) for form in forms)
        return [each for each in written if each != text]
