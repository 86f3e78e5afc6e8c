"""What a text is to be held to: `response_format`, vLLM's `structured_outputs` and `guided_...`.

Brought to one thing, a grammar's source, with the name of the parameter that it came from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import PlainValidator

from faasmoe_router.api.fields import is_text, wrong
from faasmoe_router.engine.grammar import GrammarKind, GrammarSource

_KINDS: Mapping[str, GrammarKind] = {
    "json": "json_schema",
    "json_object": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
# vLLM's settings of how, and what each may be for it to change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "disable_any_whitespace": (False,),
    "disable_fallback": (False, True),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
    "backend": ("auto", "guidance"),
}
_MAX_CHOICES = 4096


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar that was asked for, and by which parameter."""

    param: str
    source: GrammarSource


def read_response_format(value: Any) -> Constraint | None:
    """Read `response_format`: null, or an object of type text, json_object or json_schema."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong("type", "Input should be an object")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("response_format", _source("json_object", True))
    if kind != "json_schema":
        raise wrong("value", "Input should have a type of text, json_object or json_schema")
    described = value.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise wrong("value", "Input should have an object at json_schema.schema")
    return Constraint("response_format", _source("json", described["schema"]))


def read_structured_outputs(value: Any) -> Constraint | None:
    """Read `structured_outputs`: null, or an object of one of json, regex, choice and grammar."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong("type", "Input should be an object")
    for name, neutral in _NEUTRAL.items():
        if value.get(name) is not None and value[name] not in neutral:
            raise wrong("value", f"{name} is not supported by this server: Input should be without")
    asked = [name for name in _KINDS if value.get(name) not in (None, False)]
    if len(asked) > 1:
        raise wrong("value", f"Input should have only one of {', '.join(asked)}")
    if not asked:
        return None
    return Constraint("structured_outputs", _source(asked[0], value[asked[0]]))


def _read_guided(name: str, value: Any) -> Constraint | None:
    if value in (None, False):
        return None
    return Constraint(f"guided_{name}", _source(name, value))


def _source(name: str, value: Any) -> GrammarSource:
    if name == "json_object":
        return GrammarSource("json_schema", '{"type": "object"}')
    if name == "json" and not isinstance(value, str):
        if not isinstance(value, dict):
            raise wrong("type", "The schema should be an object")
        return GrammarSource("json_schema", to_json(value))
    if name == "choice":
        return GrammarSource("choice", _choices(value))
    if not is_text(value) or not value:
        raise wrong("type", f"{name} should be a string that is not empty")
    return GrammarSource(_KINDS[name], value)


def _choices(value: Any) -> str:
    if not isinstance(value, list) or not value or not all(is_text(c) and c for c in value):
        raise wrong("type", "choice should be a list of strings that are not empty")
    if len(value) > _MAX_CHOICES:
        raise wrong("value", f"choice should have at most {_MAX_CHOICES} strings")
    return to_json(value)


def to_json(value: Any) -> str:
    """Return a value of a request as JSON again; half a surrogate or NaN in it is a fault."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise wrong(
            "value", "Input should be JSON of text, of finite numbers, less deep"
        ) from error
    return text


ResponseFormat = Annotated[
    Constraint | None,
    PlainValidator(read_response_format, json_schema_input_type=dict[str, Any] | None),
]
StructuredOutputs = Annotated[
    Constraint | None,
    PlainValidator(read_structured_outputs, json_schema_input_type=dict[str, Any] | None),
]
GuidedJson = Annotated[
    Constraint | None,
    PlainValidator(
        partial(_read_guided, "json"), json_schema_input_type=str | dict[str, Any] | None
    ),
]
GuidedRegex = Annotated[
    Constraint | None,
    PlainValidator(partial(_read_guided, "regex"), json_schema_input_type=str | None),
]
GuidedChoice = Annotated[
    Constraint | None,
    PlainValidator(partial(_read_guided, "choice"), json_schema_input_type=list[str] | None),
]
GuidedGrammar = Annotated[
    Constraint | None,
    PlainValidator(partial(_read_guided, "grammar"), json_schema_input_type=str | None),
]
