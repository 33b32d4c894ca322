"""Tool calls and structured output."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel
from typing_extensions import TypedDict

from ape_integrations import ChatAPE
from ape_integrations.errors import ConfigError
from ape_integrations.langchain.tools import ToolCallFilter, parse_tool_calls, tool_format
from tests.langchain.helpers import Script, loaded_tokenizer, searching_chat, tiny_chat

NAMES = ("search", "add")
SEARCH = {"name": "search", "arguments": {"query": "Aldor"}}
ARGS = {"query": "Aldor"}


@tool
def search(query: str) -> str:
    """Look something up."""
    return query


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def saying(answer: str, *, tools: bool = True, **kwargs: Any) -> ChatAPE:
    """Return a model that gives one answer, whatever it is asked."""
    script = Script(lambda prompt: answer, loaded_tokenizer(tools))
    return tiny_chat(
        tools=tools, max_tokens=200, model_kwargs={"logits_processor": [script]}, **kwargs
    )


# Reading -----------------------------------------------------------------------------------------

JSON = json.dumps(SEARCH)


@pytest.mark.parametrize(
    "answer",
    [
        f"<tool_call>\n{JSON}\n</tool_call><|im_end|>",
        f"<tool_call>{JSON}",
        f"[TOOL_CALLS][{JSON}]</s>",
        f"[TOOL_CALLS] {JSON}",
        '[TOOL_CALLS]search{"query": "Aldor"}</s>',
        '[TOOL_CALLS]search[CALL_ID]abc[ARGS]{"query": "Aldor"}',
        '{"name": "search", "parameters": {"query": "Aldor"}}<|eot_id|>',
        '<|python_tag|>{"type": "function", "name": "search", "parameters": {"query": "Aldor"}}',
        f"```json\n{JSON}\n```",
        '{"name": "search", "arguments": "{\\"query\\": \\"Aldor\\"}"}',
    ],
)
def test_a_call_is_read_in_the_form_of_every_family(answer: str) -> None:
    found = parse_tool_calls(answer, NAMES)
    assert [(call["name"], call["args"]) for call in found.calls] == [("search", ARGS)]
    assert found.text == "" and not found.invalid


def test_several_calls_and_text_before_them_are_read() -> None:
    other = json.dumps({"name": "add", "arguments": {"a": 1, "b": 2}})
    tagged = f"Let me see.\n<tool_call>\n{JSON}\n</tool_call>\n<tool_call>\n{other}\n</tool_call>"
    for answer in (tagged, f"Let me see. [TOOL_CALLS][{JSON}, {other}]"):
        found = parse_tool_calls(answer, NAMES)
        assert [call["name"] for call in found.calls] == ["search", "add"]
        assert found.text == "Let me see."
        assert len({call["id"] for call in found.calls}) == 2
    assert len(parse_tool_calls(f"{JSON}; {other}", NAMES).calls) == 2


def test_json_that_names_no_tool_is_an_answer() -> None:
    for answer in ('{"name": "Aldor", "height": 40}', '{"name": "other", "arguments": {}}', "[1]"):
        found = parse_tool_calls(answer, NAMES)
        assert found.text == answer and not found.calls and not found.invalid


def test_unreadable_call_is_reported_as_such() -> None:
    found = parse_tool_calls('<tool_call>\n{"name": "search", "argum', NAMES)
    assert not found.calls
    assert found.invalid[0]["args"] == '<tool_call>\n{"name": "search", "argum'


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_streamed_text_ends_where_a_call_begins(size: int) -> None:
    answer = f"I look < it [up].\n<tool_call>\n{JSON}\n</tool_call>"
    passing = ToolCallFilter(tool_format("<tool_call>"))
    pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
    assert "".join(passing.push(piece) for piece in pieces) == "I look < it [up].\n"


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        ("[1] says that it is tall.", 2),
        ("```python\nprint(1)\n```", 4),
        ("[TALL] it is.", 2),
        ('{"height": 40}', 3),
        ("It is tall.", 1),
        (f"```json\n[{JSON}]", 1000),
        (f" {JSON}", 1000),
    ],
)
def test_answer_is_held_back_no_longer_than_it_may_be_a_call(answer: str, held: int) -> None:
    passing = ToolCallFilter(tool_format('"parameters"'))
    shown = [bool(passing.push(character)) for character in answer]
    assert (shown.index(True) + 1 if any(shown) else 1000) == held


def test_thoughts_hold_no_calls() -> None:
    thought = f"<think>I could call <tool_call>{JSON}</tool_call> but no.</think>"
    found = parse_tool_calls(f"{thought}\nThe answer is 5.", NAMES)
    assert not found.calls and found.text == f"{thought}\nThe answer is 5."
    found = parse_tool_calls(f"{thought}\n<tool_call>{JSON}</tool_call>", NAMES)
    assert [call["name"] for call in found.calls] == ["search"]
    assert found.text == thought
    cut = parse_tool_calls(f"<think>Perhaps <tool_call>{JSON}</tool_call>", NAMES)
    assert not cut.calls


# Calling -----------------------------------------------------------------------------------------


def test_bound_tools_are_shown_and_calls_come_back() -> None:
    chat = searching_chat()
    assert '"search"' in chat.render(
        [HumanMessage("?")], tools=chat.bind_tools([search]).kwargs["tools"]
    )
    message = chat.bind_tools([search, add]).invoke("Where is Aldor?")
    assert [(c["name"], c["args"]) for c in message.tool_calls] == [("search", ARGS)]
    assert message.content == ""


def test_streamed_calls_are_those_of_invoke() -> None:
    chat = searching_chat().bind_tools([search])
    whole: Any = None
    for chunk in chat.stream("Where is Aldor?"):
        assert chunk.content == ""
        whole = chunk if whole is None else whole + chunk
    assert isinstance(whole, AIMessageChunk)
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [("search", ARGS)]
    message = asyncio.run(chat.ainvoke("Where is Aldor?"))
    assert [c["args"] for c in message.tool_calls] == [ARGS]


CUT = '{"name": "search", "arguments": {"query": "Al'


@pytest.mark.parametrize(
    ("answer", "readable"),
    [
        (f"<tool_call>\n{CUT}", 0),
        (f"<tool_call>\n{JSON}\n</tool_call>\n<tool_call>\n{CUT}", 1),
        ("<tool_call>\n</tool_call>", 0),
        ('<tool_call>\n{"query": "Aldor"}\n</tool_call>', 0),
        (f"[TOOL_CALLS][{CUT}", 0),
        ('[TOOL_CALLS]search[ARGS]{"query": "Al', 0),
        (f'{JSON}; {{"name": 5}}', 1),
        (f'[{JSON}, {{"name": 5}}]', 1),
    ],
)
def test_unreadable_calls_are_the_same_streamed_and_not(answer: str, readable: int) -> None:
    def read(message: Any) -> Any:
        valid = [(call["name"], call["args"]) for call in message.tool_calls]
        return valid, [(bad["args"], bad["error"]) for bad in message.invalid_tool_calls]

    async def streamed(chat: Any) -> Any:
        chunks = [chunk async for chunk in chat.astream("Where is Aldor?")]
        return sum(chunks[1:], chunks[0])

    chat = saying(answer).bind_tools([search, add])
    valid, invalid = read(chat.invoke("Where is Aldor?"))
    assert len(valid) == readable and len(invalid) == 1
    assert "</s>" not in invalid[0][0]
    chunks = list(chat.stream("Where is Aldor?"))
    assert read(sum(chunks[1:], chunks[0])) == (valid, invalid)
    assert read(asyncio.run(streamed(chat))) == (valid, invalid)
    inside = saying(answer, streaming=True).bind_tools([search, add])
    assert read(inside.invoke("Where is Aldor?")) == (valid, invalid)


def test_no_token_that_ends_an_answer_is_part_of_a_call() -> None:
    text = f"<tool_call>\n{CUT}"
    chat = saying(f"{text}<|im_end|>").bind_tools([search]).bind(eos_token_id=[2, 4])
    assert [bad["args"] for bad in chat.invoke("Where?").invalid_tool_calls] == [text]


def test_text_answer_is_streamed_although_tools_are_bound() -> None:
    chunks = list(saying("Forty metres").bind_tools([search]).stream("How tall?"))
    assert len(chunks) > 5
    assert "".join(str(chunk.content) for chunk in chunks) == "Forty metres"


class Continuing(Script):
    """Ends an answer that is forced to begin with a call."""

    def __init__(self, ending: str) -> None:
        super().__init__(None, loaded_tokenizer(True))
        self._ending = ending

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        said = self._tokenizer.decode(input_ids[0]).rpartition('"arguments":')[2]
        rest = self._ending[len(said) :]
        ids = self._tokenizer(rest, add_special_tokens=False)["input_ids"] or [2]
        forced = scores.new_full(scores.shape, float("-inf"))
        forced[:, ids[0]] = 0.0
        return forced


def continuing(ending: str) -> ChatAPE:
    return tiny_chat(
        tools=True, max_tokens=80, model_kwargs={"logits_processor": [Continuing(ending)]}
    )


def test_tool_choice_begins_the_answer_with_the_call() -> None:
    chat: Any = continuing(' {"a": 1, "b": 2}}\n</tool_call>')
    bound = chat.bind_tools([search, add], tool_choice="add")
    message = bound.invoke("One and two?")
    assert [(c["name"], c["args"]) for c in message.tool_calls] == [("add", {"a": 1, "b": 2})]
    chunks = list(bound.stream("One and two?"))
    assert [c["args"] for c in sum(chunks[1:], chunks[0]).tool_calls] == [{"a": 1, "b": 2}]


def test_tool_choice_must_name_a_tool() -> None:
    with pytest.raises(ConfigError, match="none of the tools: search"):
        tiny_chat(tools=True).bind_tools([search], tool_choice="find")


@pytest.mark.parametrize("choice", ["none", {"type": "none"}])
def test_tool_choice_none_shows_no_tools(choice: Any) -> None:
    chat = searching_chat()
    assert not chat.bind_tools([search], tool_choice=choice).invoke("Where is Aldor?").tool_calls
    plain: Any = chat.bind_tools([search])
    assert not plain.invoke("Where is Aldor?", tool_choice=choice).tool_calls


@pytest.mark.parametrize(
    ("choice", "same"),
    [
        ({"type": "any"}, "any"),
        ({"type": "required"}, "any"),
        ({"type": "auto", "disable_parallel_tool_use": True}, None),
        ({"type": "tool", "name": "add"}, "add"),
        ({"type": "function", "function": {"name": "add"}}, "add"),
    ],
)
def test_tool_choice_may_be_a_dict(choice: dict[str, Any], same: str | None) -> None:
    bound: Any = tiny_chat(tools=True).bind_tools([search, add], tool_choice=choice)
    assert bound.kwargs.get("tool_choice") == same


def test_template_without_a_place_for_tools_says_so() -> None:
    with pytest.raises(ConfigError, match="no place for tools"):
        tiny_chat().bind_tools([search]).invoke("Where is Aldor?")


# Structured output -------------------------------------------------------------------------------


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


class PersonDict(TypedDict):
    """Somebody."""

    name: str
    age: int


ANSWER = 'Here it is: {"name": "Mira", "age": 50}'


@pytest.mark.parametrize("method", [None, "json_schema", "json_mode"])
def test_json_in_the_answer_becomes_an_object(method: Any) -> None:
    chat = saying(ANSWER, tools=False).with_structured_output(Person, method=method)
    assert chat.invoke("Who?") == Person(name="Mira", age=50)


@pytest.mark.parametrize(
    "before",
    [
        '<think>Perhaps {"name": "Wrong", "age": 1}?</think>\n',
        'The schema is {"type": "object"}. ',
        '{"name": "nobody"} is no answer, but this is: ',
    ],
)
def test_object_of_the_right_shape_is_the_answer(before: str) -> None:
    chat = saying(f"{before}{ANSWER}", tools=False).with_structured_output(Person)
    assert chat.invoke("Who?") == Person(name="Mira", age=50)


def test_agents_may_ask_for_a_provider_to_follow_the_schema() -> None:
    """A template without tools serves them too."""
    agent = create_agent(saying(ANSWER, tools=False), [], response_format=ProviderStrategy(Person))
    state = agent.invoke({"messages": [HumanMessage("Who?")]})
    assert state["structured_response"] == Person(name="Mira", age=50)


def test_response_format_is_that_of_other_providers() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    described = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    chat = saying(ANSWER, tools=False)
    for given in (described, {"type": "json_object"}):
        assert json.loads(chat.bind(response_format=given).invoke("Who?").text)["age"] == 50
    assert chat.invoke("Who?", response_format={"type": "text"}).text == ANSWER
    for wrong in ("json", {"type": "json_schema"}, {"type": "grammar"}):
        with pytest.raises(ConfigError, match="response_format must be"):
            chat.invoke("Who?", response_format=wrong)


def test_tools_of_other_providers_are_refused() -> None:
    with pytest.raises(ConfigError, match="'web_search_preview' is run by another provider"):
        tiny_chat(tools=True).bind_tools([{"type": "web_search_preview"}])


def test_schema_is_asked_for_at_the_end_of_the_prompt() -> None:
    prompts: list[str] = []

    def say(prompt: str) -> str:
        prompts.append(prompt)
        return ANSWER

    script = Script(say, loaded_tokenizer())
    chat = tiny_chat(max_tokens=60, model_kwargs={"logits_processor": [script]})
    chat.with_structured_output(Person).invoke([HumanMessage("Who?")])
    question = prompts[0].rpartition("<|im_start|>user\n")[2]
    assert question.startswith("Who?") and '"age"' in question
    chat.with_structured_output(Person, method="json_mode").invoke("Who?")
    assert '"age"' not in prompts[-1]


def test_dict_schemas_give_dicts() -> None:
    chat = saying(ANSWER, tools=False)
    expected = {"name": "Mira", "age": 50}
    assert chat.with_structured_output(PersonDict).invoke("Who?") == expected
    schema = Person.model_json_schema()
    assert chat.with_structured_output(schema).invoke("Who?") == expected


def test_dicts_are_read_and_not_validated() -> None:
    chat = saying('{"town": 7}', tools=False)
    assert chat.with_structured_output(PersonDict).invoke("Who?") == {"town": 7}


def test_cut_answer_is_an_error_streamed_and_not() -> None:
    structured = continuing(' {"name": "Mi').with_structured_output(PersonDict)

    async def streamed() -> list[Any]:
        return [part async for part in structured.astream("Who?")]

    for read in (
        lambda: structured.invoke("Who?"),
        lambda: list(structured.stream("Who?")),
        lambda: asyncio.run(streamed()),
    ):
        with pytest.raises(OutputParserException):
            read()


@pytest.mark.parametrize("tools", [False, True])
def test_no_messages_are_refused_with_a_schema_as_without(tools: bool) -> None:
    chat = tiny_chat(tools=tools)
    for model in (chat, chat.with_structured_output(Person)):
        with pytest.raises(ConfigError, match="no messages to render"):
            model.invoke([])


def test_template_with_tools_answers_through_a_call() -> None:
    chat = continuing(' {"name": "Mira", "age": 50}}\n</tool_call>')
    structured = chat.with_structured_output(Person)
    assert structured.invoke("Who?") == Person(name="Mira", age=50)
    assert list(structured.stream("Who?")) == [Person(name="Mira", age=50)]
    raw = chat.with_structured_output(Person, include_raw=True).invoke("Who?")
    assert isinstance(raw["raw"], AIMessage) and raw["parsed"] == Person(name="Mira", age=50)
    agent = create_agent(chat, [], response_format=ToolStrategy(Person))
    state = agent.invoke({"messages": [HumanMessage("Who?")]})
    assert state["structured_response"] == Person(name="Mira", age=50)


def test_unreadable_answer_raises_or_is_returned_raw() -> None:
    chat = saying("I do not know.", tools=False)
    with pytest.raises(OutputParserException, match="no JSON object"):
        chat.with_structured_output(Person).invoke("Who?")
    result = chat.with_structured_output(Person, include_raw=True).invoke("Who?")
    assert result["parsed"] is None
    assert isinstance(result["parsing_error"], OutputParserException)
    assert result["raw"].content == "I do not know."
    wrong = saying('{"name": "Mira"}', tools=False).with_structured_output(Person)
    with pytest.raises(OutputParserException, match="shape of Person"):
        wrong.invoke("Who?")


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown method"):
        tiny_chat().with_structured_output(Person, method="telepathy")  # type: ignore[arg-type]
