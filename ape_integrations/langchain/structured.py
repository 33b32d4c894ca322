"""Answers of a given shape: asking for them and reading them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import TypeBaseModel, is_basemodel_subclass

from ape_integrations.errors import ConfigError
from ape_integrations.langchain.tools import after_thoughts

Schema = dict[str, Any] | type

_DECODER = json.JSONDecoder(strict=False)


def schema_tool(schema: Schema) -> dict[str, Any]:
    """Return a schema as the tool that a model calls to answer in its shape."""
    tool: dict[str, Any] = convert_to_openai_tool(schema)
    return tool


def schema_of_format(given: Any) -> dict[str, Any] | None:
    """Return the schema of a ``response_format`` in OpenAI's form, as a tool.

    None for ``{"type": "json_object"}`` and ``{"type": "text"}``, which ask for no schema.

    Raises
    ------
    ConfigError
        It is none of the three.
    """
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind in ("text", "json_object"):
        return None
    described = given.get("json_schema") if kind == "json_schema" else None
    if not isinstance(described, Mapping) or not isinstance(described.get("schema"), Mapping):
        raise ConfigError(
            'response_format must be {"type": "json_schema", "json_schema": {"schema": ...}}, '
            f'{{"type": "json_object"}} or {{"type": "text"}}, not {given!r}.'
        )
    name = str(described.get("name") or described["schema"].get("title") or "answer")
    return schema_tool({**described["schema"], "title": name})


def with_instruction(messages: Sequence[BaseMessage], tool: Mapping[str, Any]) -> list[BaseMessage]:
    """Ask for JSON at the very end, so that the prefix of the prompt stays what it is."""
    parameters = json.dumps(tool["function"]["parameters"], ensure_ascii=False)
    instruction = f"Answer with one JSON object that follows this JSON schema:\n{parameters}"
    if not messages:
        return []  # which rendering refuses, like every empty prompt
    last = messages[-1]
    if isinstance(last, HumanMessage) and isinstance(last.content, str):
        asked = last.model_copy(update={"content": f"{last.content}\n\n{instruction}"})
        return [*messages[:-1], asked]
    return [*messages, HumanMessage(instruction)]


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects behind the thoughts in a text, in order, not those inside others."""
    _, answer = after_thoughts(text)
    position = answer.find("{")
    while position >= 0:
        try:
            value, end = _DECODER.raw_decode(answer, position)
            yield value
        except json.JSONDecodeError:
            end = position + 1
        position = answer.find("{", end)


class StructuredParser(BaseOutputParser[Any]):
    """Reads an answer of a given shape from a tool call, or from JSON in the text.

    Parameters
    ----------
    target : type or dict
        A pydantic class, which the answer becomes an instance of; anything else gives a dict.
    """

    target: Any

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        """Return the answer of a message.

        Raises
        ------
        OutputParserException
            No JSON object, or one of another shape.
        """
        generation = result[0]
        message = generation.message if isinstance(generation, ChatGeneration) else None
        if isinstance(message, AIMessage) and message.tool_calls:
            return self._validated(message.tool_calls[0]["args"], generation.text)
        return self.parse(generation.text)

    def parse(self, text: str) -> Any:
        """Return the first JSON object behind the thoughts in a text that has the right shape."""
        wrong: OutputParserException | None = None
        for value in json_objects(text):
            try:
                return self._validated(value, text)
            except OutputParserException as error:
                wrong = wrong or error
        missing = OutputParserException("The answer holds no JSON object.", llm_output=text)
        raise wrong or missing

    def _validated(self, value: dict[str, Any], text: str) -> Any:
        if not (isinstance(self.target, type) and is_basemodel_subclass(self.target)):
            return value
        return _instance(self.target, value, text)

    @property
    def _type(self) -> str:
        return "ape-structured"


def _instance(target: TypeBaseModel, value: dict[str, Any], text: str) -> Any:
    try:
        if hasattr(target, "model_validate"):
            return target.model_validate(value)
        return target.parse_obj(value)
    except ValueError as error:
        raise OutputParserException(
            f"The answer does not have the shape of {target.__name__}: {error}", llm_output=text
        ) from error
