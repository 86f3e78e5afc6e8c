"""Tools, the choice between them and earlier calls of them, as requests give them.

Custom tools, whose argument is one text, become functions with one parameter. What chat templates
expect is completed, and earlier calls that no template could render are made harmless.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from faasmoe_router.api.structured_outputs import dump_json
from faasmoe_router.api.validation import RequestModel, Text, field_error, is_valid_text

CUSTOM_TOOL_INPUT = "input"
FUNCTION_NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def _parse_function_parameters(value: Any) -> Mapping[str, Any]:
    if value is None:
        return _NO_PARAMETERS
    if not isinstance(value, dict):
        raise field_error("type", "Input should be a JSON schema, an object")
    if value.get("type", "object") != "object":
        raise field_error("value", "Input should be a JSON schema of type object")
    dump_json(value)  # rejects what JSON cannot represent
    return value


FunctionParameters = Annotated[
    Mapping[str, Any],
    PlainValidator(_parse_function_parameters, json_schema_input_type=dict[str, Any] | None),
]


class FunctionDefinition(RequestModel):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME_PATTERN)]
    description: Text | None = None
    parameters: FunctionParameters = Field(default_factory=lambda: _parse_function_parameters(None))
    strict: bool | None = None


def _custom_as_function(value: Any) -> Any:
    """Return a custom tool as a function with one text, `input`; other values unchanged."""
    if not isinstance(value, dict) or value.get("type") != "custom" or "function" in value:
        return value
    custom = value.get("custom")
    if not isinstance(custom, dict):
        raise field_error("type", "Input should have an object 'custom'")
    text_format = custom.get("format") or {"type": "text"}
    if not isinstance(text_format, dict) or text_format.get("type") != "text":
        raise field_error(
            "value", "custom.format should be of type text; grammars are not supported here"
        )
    function = {name: custom[name] for name in ("name", "description") if name in custom}
    return {"type": "custom", "function": {**function, "parameters": _CUSTOM_TOOL_PARAMETERS}}


_CUSTOM_TOOL_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {CUSTOM_TOOL_INPUT: {"type": "string"}},
    "required": [CUSTOM_TOOL_INPUT],
    "additionalProperties": False,
}


class ToolParam(RequestModel):
    """A tool that the model may call; a custom tool is a function whose argument is one text."""

    type: Literal["function", "custom"]
    function: FunctionDefinition

    _translate_custom = model_validator(mode="before")(_custom_as_function)

    def to_template(self, chat_template: str) -> dict[str, Any]:
        """Return the tool as a chat template expects it: name, description, parameters.

        Templates read the parameters' properties, and those that name descriptions these too,
        without asking whether they exist. Others write tools as they are.
        """
        function_schema: dict[str, Any] = {"name": self.function.name}
        if self.function.description or "description" in chat_template:
            function_schema["description"] = self.function.description or ""
        function_schema["parameters"] = {**_NO_PARAMETERS, **self.function.parameters}
        return {"type": "function", "function": function_schema}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may or must call tools.

    Attributes:
        mode: `none`: it may not; `auto`: it decides; `required`: at least one; `named`: `name`.
        name: the tool to call in mode `named`, else None.
        allowed: names of the only tools that may be called; None allows all.
    """

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None
    allowed: frozenset[str] | None = None

    @property
    def named_tools(self) -> frozenset[str]:
        """Names of the tools that it refers to."""
        return frozenset(() if self.name is None else (self.name,)) | (self.allowed or frozenset())


def parse_tool_choice(value: Any) -> ToolChoice | None:
    """Parse `tool_choice`: null, a mode, or an object that names a tool or the allowed tools."""
    if value is None:
        return None
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    expected = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
    if not isinstance(value, str | dict):
        raise field_error("type", f"Input should be {expected}")
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return _parse_allowed_tools(value.get("allowed_tools"))
    name = _tool_name(value)
    if name is None:
        raise field_error("value", f"Input should be {expected}")
    return ToolChoice("named", name)


def _tool_name(value: Any) -> str | None:
    """Return the name in a reference to a tool; None if it is not one."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("function", "custom"):
        return None
    tool = value.get(kind)
    name = tool.get("name") if isinstance(tool, dict) else None
    return name if isinstance(name, str) else None


def _parse_allowed_tools(value: Any) -> ToolChoice:
    mode = value.get("mode") if isinstance(value, dict) else None
    tools = value.get("tools") if isinstance(value, dict) else None
    names = [_tool_name(tool) for tool in tools] if isinstance(tools, list) else []
    if mode not in ("auto", "required") or not names or None in names:
        raise field_error(
            "value", "allowed_tools should have a mode, auto or required, and a list of tools"
        )
    return ToolChoice(mode, allowed=frozenset(name for name in names if name is not None))


ToolChoiceField = Annotated[
    ToolChoice | None,
    PlainValidator(parse_tool_choice, json_schema_input_type=str | dict[str, Any] | None),
]


def _parse_call_arguments(value: Any) -> Mapping[str, Any]:
    """Parse the arguments of an earlier call, an object or its JSON text.

    A call that `max_tokens` cut short, or that the model got wrong, has arguments that are not a
    JSON object. The conversation goes on, as in vLLM, with none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
            dump_json(value)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}
    if value is None or isinstance(value, list):
        return {}
    if not isinstance(value, dict):
        raise field_error("type", "Input should be a JSON object, or a string that contains one")
    dump_json(value)
    return value


CallArguments = Annotated[
    Mapping[str, Any],
    PlainValidator(_parse_call_arguments, json_schema_input_type=str | dict[str, Any] | None),
]


class FunctionCallParam(RequestModel):
    """The function of an earlier tool call."""

    name: Text
    arguments: CallArguments = Field(default_factory=dict)


def _custom_call_as_function(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("type") != "custom" or "custom" not in value:
        return value
    custom = value["custom"]
    if not isinstance(custom, dict) or not is_valid_text(custom.get("input")):
        raise field_error("type", "custom should be an object with a name and an input")
    arguments = {CUSTOM_TOOL_INPUT: custom["input"]}
    function = {"name": custom.get("name"), "arguments": arguments}
    return {**value, "type": "function", "function": function}


class ToolCallParam(RequestModel):
    """An earlier tool call by the assistant."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCallParam

    _translate_custom = model_validator(mode="before")(_custom_call_as_function)

    def to_template(self) -> dict[str, Any]:
        """Return the call as chat templates expect it: its arguments as an object."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": "function", "function": function}
