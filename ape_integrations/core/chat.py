"""Messages -> rendered prompt, through whatever chat template the tokenizer has."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ape_integrations.core.messages import (
    Abilities,
    Message,
    adapt,
    checked,
    guard,
    with_short_ids,
    without_tools,
)
from ape_integrations.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Date that templates see; a changing one in the prefix would make every key new.
DEFAULT_DATE = datetime.date(2024, 7, 26)

_PLAIN_HEADERS = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    template_date: datetime.date | None = DEFAULT_DATE,
    **template_kwargs: Any,
) -> str:
    """Render messages with the tokenizer's chat template.

    What the template can do is found out by trying, once per template. Messages are rewritten only
    as far as it needs: repeated roles are merged with a blank line between them, system messages
    become one, or a part of the next user message where the template knows no system role (or none
    in the middle), tool calls and results become readable text. A tokenizer without a template
    gets plain ``System:``, ``User:`` and ``Assistant:`` paragraphs.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    messages : sequence of dict
        Each with ``role`` (system, user, assistant or tool) and ``content`` (text, or a list of
        text parts), and what else the template reads (``tool_calls``, ``name``, ``tool_call_id``).
    tools : sequence, optional
        Tools as transformers takes them: JSON schemas or typed functions.
    add_generation_prompt : bool
        Whether to end with the header of the answer.
    template_date : datetime.date, optional
        Date for templates that ask for the current one. It is constant by default, because a
        prefix that changes every day would make every stored entry useless the next day. None: the
        real date.
    **template_kwargs
        Passed to the template, for example ``enable_thinking=False``.

    Returns
    -------
    str
        Special tokens included: encode it without adding them again.

    Raises
    ------
    ConfigError
        For no messages, an unknown role, content other than text, tools that the template cannot
        show, or a template that refuses the messages in every form.
    """
    specials = tuple(map(str, tokenizer.all_special_tokens))
    chat = [guard(checked(message), specials) for message in messages]
    if not chat:
        raise ConfigError(
            "There are no messages to render: pass at least one, such as a user message."
        )
    if _template(tokenizer, tools) is None:
        if tools:
            raise ConfigError(
                "The tokenizer has no chat template, so tools cannot be described to the model: "
                "use a tokenizer with a tool template or leave the tools out."
            )
        return _plain(chat, add_generation_prompt)

    def render(some: Sequence[Message]) -> str:
        return _render(
            tokenizer,
            some,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template_date=template_date,
            **template_kwargs,
        )

    can = _abilities(tokenizer, tools)
    if tools and not can.tools:
        raise ConfigError(
            "The chat template of this tokenizer has no place for tools: use a model with tool "
            "support or leave the tools out."
        )
    problem: Exception | None = None
    rendered: str | None = None
    for attempt in (can, Abilities(tool_role=can.tool_role, system=can.system), Abilities()):
        adapted = adapt(chat, attempt)
        for some in (adapted, [with_short_ids(message) for message in adapted]):
            try:
                text = render(some)
            except Exception as error:  # a template may raise anything
                problem = problem or error
                continue
            if _shows_all(text, chat):
                return text
            rendered = rendered or text
    if rendered is not None:
        return rendered
    raise ConfigError(
        f"The chat template of this tokenizer refuses the messages (roles: "
        f"{', '.join(message['role'] for message in chat)}): {problem}"
    ) from problem


def _shows_all(text: str, chat: Sequence[Message]) -> bool:
    """Whether no message was dropped; templates may well drop thoughts of earlier answers."""
    for message in chat:
        content = message["content"].strip()
        shown = content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
        if not shown and message["role"] != "assistant":
            return False
    return True


def template_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Strings that stand for special tokens in a rendered prompt, longest first.

    These are the tokenizer's special tokens and the added tokens that look like markup (such as
    ``<tool_response>``), without reserved ones.
    """
    tokens = set(map(str, tokenizer.all_special_tokens)) | {
        token for token in tokenizer.get_added_vocab() if re.match(r"[<\[|{].*[>\]|}]$", token)
    }
    numbered = re.compile(r".*(?:reserved|unused|extra_id|placeholder).*\d")
    kept = (token for token in tokens if token.strip() and not numbered.match(token))
    return tuple(sorted(kept, key=lambda token: (-len(token), token)))


def turn_markers(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the text with which the chat template begins a message, by role.

    Learned by rendering small conversations. A role whose header cannot be told is left out.
    """
    if _template(tokenizer, None) is None:
        return dict(_PLAIN_HEADERS)
    system, first, answer, second = (f"zq{i}zq" for i in range(4))
    chat = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    markers: dict[str, str] = {}
    try:
        asked = _render(tokenizer, chat[:1], add_generation_prompt=False)
        opened = _render(tokenizer, chat[:1], add_generation_prompt=True)
        answered = _render(tokenizer, chat[:2], add_generation_prompt=False)
        whole = _render(tokenizer, chat, add_generation_prompt=False)
    except Exception:  # a template may raise anything; headers of common families are known anyway
        return markers
    if opened.startswith(asked):
        markers["assistant"] = opened[len(asked) :]
    ending = answered[answered.rfind(answer) + len(answer) :]
    between = whole[whole.find(answer) + len(answer) : whole.find(second)]
    if between.startswith(ending):
        markers["user"] = between[len(ending) :]
    try:
        told = _render(
            tokenizer,
            [{"role": "system", "content": system}, *chat[:1]],
            add_generation_prompt=False,
        )
    except Exception:
        told = ""
    bos = str(tokenizer.bos_token or "")
    header = told[: told.find(system)].lstrip().removeprefix(bos) if system in told else ""
    if header.strip() != markers.get("user", "").strip():
        markers["system"] = header
    return {role: marker for role, marker in markers.items() if marker.strip()}


def _template(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None) -> str | None:
    try:
        template: str = tokenizer.get_chat_template(tools=list(tools) if tools else None)
    except (ValueError, AttributeError):
        return None
    return template


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    template_date: datetime.date | None = DEFAULT_DATE,
    **template_kwargs: Any,
) -> str:
    template = _template(tokenizer, tools) or ""
    if template_date is not None and "strftime_now" in template:
        template = _frozen_clock(template_date) + template
    rendered = tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) if tools else None,
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        **template_kwargs,
    )
    return str(rendered)


_PERCENT = "\ue000"  # for private use: stands for a percent sign that was written


@functools.lru_cache(maxsize=16)
def _frozen_clock(date: datetime.date) -> str:
    """Template text that answers `strftime_now` with a fixed date.

    transformers gives templates this function as a global and lets no function pass as a keyword,
    but a macro of the template itself comes before a global. It replaces the directives one by
    one.
    """
    midnight = datetime.datetime.combine(date, datetime.time())
    expression = f"format|replace('%%', '{_PERCENT}')"
    for directive in "AaBbdmyYjHIMSpeFTDxXcUWwuGVfZz":
        value = midnight.strftime(f"%{directive}")
        expression += f"|replace('%-{directive}', '{value.lstrip('0') or value[-1:]}')"
        expression += f"|replace('%{directive}', '{value}')"
    expression += f"|replace('{_PERCENT}', '%')"
    # The empty expression at the end keeps a line break that the template begins with.
    return "{% macro strftime_now(format) %}{{ " + expression + " }}{% endmacro %}{{ '' }}"


# What the template can do ------------------------------------------------------------------------

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "zqtoolzq",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "A word."}},
            "required": ["word"],
        },
    },
}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "zqcallzq1",
            "type": "function",
            "function": {"name": "zqcalledzq", "arguments": {"word": "zqargumentzq"}},
        }
    ],
}


def _abilities(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None) -> Abilities:
    template = _template(tokenizer, tools)
    specials = tuple(sorted((name, str(t)) for name, t in tokenizer.special_tokens_map.items()))
    key = hashlib.sha256(repr((template, specials)).encode()).hexdigest()
    with _abilities_lock:
        if key not in _known_abilities:
            if len(_known_abilities) >= _MAX_KNOWN:
                _known_abilities.clear()
            _known_abilities[key] = _probe(functools.partial(_render, tokenizer))
        return _known_abilities[key]


_MAX_KNOWN = 64
_known_abilities: dict[str, Abilities] = {}
_abilities_lock = threading.Lock()


def _probe(render: Callable[..., str]) -> Abilities:
    def shows(*messages: Message, wanted: str = "", **kwargs: Any) -> bool:
        """Whether the template renders the messages, all of their texts in their order."""
        try:
            text = render(messages, **kwargs)
        except Exception:  # a template may raise anything
            return False
        texts = [message["content"] for message in messages if message["content"]]
        places = [text.find(each) for each in texts]
        return -1 not in places and places == sorted(places) and wanted in text

    def say(role: str, number: int, **kwargs: Any) -> Message:
        return {"role": role, "content": f"zq{role}{number}zq", **kwargs}

    user, again, answer = say("user", 1), say("user", 2), say("assistant", 1)
    result = say("tool", 1, name="zqcalledzq", tool_call_id="zqcallzq1")
    return Abilities(
        system=shows(say("system", 1), user),
        late_system=shows(user, answer, say("system", 1), again)
        and shows(say("system", 1), say("system", 2), user),
        repeats=shows(user, again) and shows(user, answer, say("assistant", 2), again),
        opening=shows(answer, user),
        tool_role=shows(user, _CALL, result, wanted="zqargumentzq"),
        tools=shows(user, wanted="zqtoolzq", tools=[_PROBE_TOOL]),
    )


def _plain(chat: Sequence[Message], add_generation_prompt: bool) -> str:
    """Render without a template."""
    paragraphs = [
        _PLAIN_HEADERS[message["role"]] + message["content"].strip()
        for message in map(without_tools, chat)
    ]
    if add_generation_prompt:
        paragraphs.append(_PLAIN_HEADERS["assistant"].rstrip())
    return "\n\n".join(paragraphs)
