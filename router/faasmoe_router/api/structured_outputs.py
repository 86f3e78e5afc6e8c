"""Parsing of the parameters that constrain the output.

OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*` parameters, and
SGLang's and llama.cpp's `regex`, `ebnf`, `grammar` and `json_schema` are all parsed into a
`StructuredOutput`: the source of one grammar, and the parameter that it came from,
for errors. The engine compiles the grammar.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from faasmoe_router.api.validation import field_error, is_valid_text
from faasmoe_router.engine.structured_output import GrammarKind, GrammarSource

_GRAMMAR_KINDS: Mapping[str, GrammarKind] = {
    "json": "json_schema",
    "json_object": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
# vLLM's other options of `structured_outputs`, each with the values that change nothing.
_NEUTRAL_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "disable_any_whitespace": (False,),
    "disable_fallback": (False, True),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
    "backend": ("auto", "guidance"),
}
_MAX_CHOICES = 4096


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """A requested grammar.

    Attributes:
        param: the parameter that requested it.
        grammar: its source.
    """

    param: str
    grammar: GrammarSource


def parse_response_format(value: Any) -> StructuredOutput | None:
    """Parse `response_format`: null, or an object of type text, json_object or json_schema."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise field_error("type", "Input should be an object")
    format_type = value.get("type")
    if format_type == "text":
        return None
    if format_type == "json_object":
        return StructuredOutput("response_format", _grammar_source("json_object", True))
    if format_type != "json_schema":
        raise field_error("value", "'type' should be text, json_object or json_schema")
    schema_spec = value.get("json_schema")
    if not isinstance(schema_spec, dict) or not isinstance(schema_spec.get("schema"), dict):
        raise field_error("value", "'json_schema.schema' should be an object")
    source = _grammar_source("json", schema_spec["schema"])
    if schema_spec.get("strict") is False:
        source = GrammarSource("lenient_json_schema", source.text)
    return StructuredOutput("response_format", source)


def parse_structured_outputs(value: Any) -> StructuredOutput | None:
    """Parse `structured_outputs`: null, or an object with one of json, regex, choice, grammar."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise field_error("type", "Input should be an object")
    for name, neutral in _NEUTRAL_OPTIONS.items():
        if value.get(name) is not None and value[name] not in neutral:
            raise field_error("value", f"{name} is not supported by this server")
    requested = [name for name in _GRAMMAR_KINDS if value.get(name) not in (None, False)]
    if len(requested) > 1:
        raise field_error("value", f"Input should have at most one of {', '.join(requested)}")
    if not requested:
        return None
    return StructuredOutput(
        "structured_outputs", _grammar_source(requested[0], value[requested[0]])
    )


def _parse_constraint(param: str, name: str, value: Any) -> StructuredOutput | None:
    if value in (None, False):
        return None
    return StructuredOutput(param, _grammar_source(name, value))


def _grammar_source(name: str, value: Any) -> GrammarSource:
    if name == "json_object":
        return GrammarSource("json_schema", '{"type": "object"}')
    if name == "json" and not isinstance(value, str):
        if not isinstance(value, dict):
            raise field_error("type", "The schema should be an object")
        return GrammarSource("json_schema", dump_json(value))
    if name == "choice":
        return GrammarSource("choice", _choice_grammar(value))
    if not is_valid_text(value) or not value:
        raise field_error("type", f"{name} should be a non-empty string")
    return GrammarSource(_GRAMMAR_KINDS[name], value)


def _choice_grammar(value: Any) -> str:
    if isinstance(value, list) and len(value) > _MAX_CHOICES:
        raise field_error("value", f"choice should have at most {_MAX_CHOICES} strings")
    if not isinstance(value, list) or not value or not all(is_valid_text(c) and c for c in value):
        raise field_error("type", "choice should be a list of non-empty strings")
    return dump_json(value)


def dump_json(value: Any) -> str:
    """Serialise a value of a request; raises a field error for lone surrogates, NaN, and depth."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise field_error(
            "value", "Input should be valid JSON: valid Unicode, finite numbers, limited nesting"
        ) from error
    return text


def is_json(value: Any) -> bool:
    """Return whether a value has a JSON form: valid Unicode, finite numbers, limited nesting."""
    try:
        dump_json(value)
    except PydanticCustomError:
        return False
    return True


ResponseFormat = Annotated[
    StructuredOutput | None,
    PlainValidator(parse_response_format, json_schema_input_type=dict[str, Any] | None),
]
StructuredOutputs = Annotated[
    StructuredOutput | None,
    PlainValidator(parse_structured_outputs, json_schema_input_type=dict[str, Any] | None),
]


def _constraint_field(param: str, name: str, schema_type: Any) -> PlainValidator:
    parse = partial(_parse_constraint, param, name)
    return PlainValidator(parse, json_schema_input_type=schema_type | None)


_JSON = str | dict[str, Any]
GuidedJson = Annotated[StructuredOutput | None, _constraint_field("guided_json", "json", _JSON)]
GuidedRegex = Annotated[StructuredOutput | None, _constraint_field("guided_regex", "regex", str)]
GuidedChoice = Annotated[
    StructuredOutput | None, _constraint_field("guided_choice", "choice", list[str])
]
GuidedGrammar = Annotated[
    StructuredOutput | None, _constraint_field("guided_grammar", "grammar", str)
]
JsonSchema = Annotated[StructuredOutput | None, _constraint_field("json_schema", "json", _JSON)]
Regex = Annotated[StructuredOutput | None, _constraint_field("regex", "regex", str)]
Ebnf = Annotated[StructuredOutput | None, _constraint_field("ebnf", "grammar", str)]
Grammar = Annotated[StructuredOutput | None, _constraint_field("grammar", "grammar", str)]
