"""The tools of a request: what may be called, and what is to be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from faasmoe_router.api.constraints import to_json
from faasmoe_router.api.fields import Text, wrong

MAX_TOOLS = 128
NAME = r"^[A-Za-z0-9_-]{1,64}$"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


def _read_parameters(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {"type": "object", "properties": {}}
    if not isinstance(value, dict):
        raise wrong("type", "Input should be a JSON schema, an object")
    if value.get("type", "object") != "object":
        raise wrong("value", "Input should be a JSON schema of type object")
    to_json(value)
    return value


Parameters = Annotated[
    Mapping[str, Any],
    PlainValidator(_read_parameters, json_schema_input_type=dict[str, Any] | None),
]


class Function(_Part):
    """A function that may be called."""

    name: Annotated[str, Field(pattern=NAME)]
    description: Text | None = None
    parameters: Parameters = Field(default_factory=lambda: _read_parameters(None))
    strict: bool | None = None


class ToolPart(_Part):
    """One tool of a request."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """Return what a chat template takes."""
        said = {"name": self.function.name, "parameters": self.function.parameters}
        if self.function.description is not None:
            said = {"name": said["name"], "description": self.function.description, **said}
        return {"type": "function", "function": said}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are to be called.

    Attributes:
        mode: none, if the model likes, at least one, or the one that is named.
        name: the tool that is named.
    """

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


def read_tool_choice(value: Any) -> ToolChoice | None:
    """Read `tool_choice`: null, a mode, or an object that names a function."""
    if value is None:
        return None
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    expected = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
    if not isinstance(value, str | dict):
        raise wrong("type", f"Input should be {expected}")
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(name, str):
        raise wrong("value", f"Input should be {expected}")
    return ToolChoice("named", name)


ToolChoiceField = Annotated[
    ToolChoice | None,
    PlainValidator(read_tool_choice, json_schema_input_type=str | dict[str, Any] | None),
]
