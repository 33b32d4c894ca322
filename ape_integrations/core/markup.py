"""Where messages and lines begin in a rendered chat prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Strings of this kind are written by chat templates; what a tokenizer adds to them comes on top.
_TOKEN = (
    r"<\|[^|<>\s]{1,48}\|>|<\uff5c[^\uff5c<>\n]{1,48}\uff5c>|</?(?:s|bos|eos|start_of_turn|end_of_turn)>"
    r"|\[/?[A-Z][A-Z_]{2,24}\]|<</?SYS>>"
)
# Headers of one message, with the role where the header names it.
_CLOSE = (
    r"(?:<\|(?:end_header_id|header_end|end_of_role|message)\|>|<\|channel\|>\w+<\|message\|>)?"
    r"[ \t]*\n{0,2}"
)
_HEADERS = (
    r"<\|(?:im_start|start_header_id|header_start|start_of_role|start|turn)\|>\s*([\w.-]+)"
    + _CLOSE,
    r"<start_of_turn>\s*(\w+)\n?",
    r"<\|(system|developer|user|assistant|model|tool|observation|ipython)\|>\n?",
    r"<\|START_OF_TURN_TOKEN\|><\|(\w+?)_TOKEN\|>",
    r"<\uff5c(System|User|Assistant|tool\u2581outputs\u2581begin)\uff5c>",
    r"\[(/?INST|TOOL_RESULTS|SYSTEM_PROMPT)\]",
)
_SYSTEM_ROLES = frozenset({"system", "developer", "system_prompt"})
_ANSWER_ROLES = frozenset({"assistant", "model", "chatbot", "/inst"})


@dataclass(frozen=True)
class Turn:
    """One message of a prompt: where its header begins and ends, and whose message it is."""

    start: int
    end: int
    is_system: bool
    is_answer: bool


class ChatMarkup:
    """Recognises special tokens and message headers in rendered text.

    The headers of common families are known (ChatML, Llama 3, Gemma, Mistral, Phi, Zephyr, Cohere,
    DeepSeek, Granite, GPT-OSS); others are added as the tokenizer's template writes them.

    Parameters
    ----------
    special_tokens : sequence of str
        The tokenizer's special tokens.
    turn_markers : mapping of str to str
        Header of a message by role, for example ``{"user": "<|user|>"}``.
    """

    def __init__(
        self, special_tokens: Sequence[str] = (), turn_markers: Mapping[str, str] | None = None
    ) -> None:
        self._markers = {
            marker.strip(): role for role, marker in (turn_markers or {}).items() if marker.strip()
        }
        known = re.compile(_TOKEN)
        extra = sorted(
            {token for token in special_tokens if token.strip() and not known.fullmatch(token)},
            key=len,
            reverse=True,
        )
        self._token = re.compile("|".join([_TOKEN, *map(re.escape, extra)]))
        self._header = re.compile("|".join([*_HEADERS, *map(_marker_pattern, self._by_length())]))

    def _by_length(self) -> list[str]:
        return sorted(self._markers, key=len, reverse=True)

    def has_token(self, text: str) -> bool:
        """Whether a special token occurs in a text."""
        return self._token.search(text) is not None

    def first_token(self, text: str) -> int:
        """Where the first special token begins; without one, the length of the text."""
        match = self._token.search(text)
        return match.start() if match else len(text)

    def token_ends(self, text: str) -> list[int]:
        """Positions right after each special token."""
        return [match.end() for match in self._token.finditer(text)]

    def token_ends_at(self, text: str, position: int) -> bool:
        """Whether a special token ends at a position."""
        start = max(0, position - 64)
        return any(start + end == position for end in self.token_ends(text[start:position]))

    def token_at(self, text: str, position: int) -> bool:
        """Whether a special token begins at a position."""
        return self._token.match(text, position) is not None

    def turns(self, text: str) -> list[Turn]:
        """Messages of a prompt, in order."""
        found = []
        for match in self._header.finditer(text):
            role = next((group for group in match.groups() if group), None)
            role = (role or self._markers.get(match.group().strip(), "")).lower()
            is_system, is_answer = role in _SYSTEM_ROLES, role in _ANSWER_ROLES
            found.append(Turn(match.start(), match.end(), is_system, is_answer))
        return found

    def boundary(self, text: str, position: int) -> int:
        """Return the last beginning of a line or message at or before a position.

        A position inside a message's header goes back to where the header begins, so that a cut
        there never separates a special token from its role.
        """
        position = min(position, len(text))
        start = text.rfind("\n", 0, position) + 1
        for match in self._token.finditer(text, start):
            if match.end() > position:
                break
            start = match.end()
        window = max(0, text.rfind("\n", 0, max(0, start - 2)) + 1)
        for match in self._header.finditer(text, window):
            if match.start() >= start:
                break
            if start < match.end():
                return match.start()
        return start


def _marker_pattern(marker: str) -> str:
    # A header without a special token ("User:") counts at the start of a line or message only.
    pattern = re.escape(marker)
    return pattern if re.match(r"[<\[]", marker) else rf"(?:(?<![^\n])|(?<=[>\]]))[ \t]*{pattern}"
