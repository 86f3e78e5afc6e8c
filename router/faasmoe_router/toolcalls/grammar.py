"""Lark grammar that restricts a text to calls of given tools."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faasmoe_router.toolcalls.formats import ToolCallFormat

MAX_TOOL_CALLS = 16

MarkerEncoder = Callable[[str], str]  # a format's marker -> its Lark terminal


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool that may be called.

    Attributes:
        name: letters, digits, underscores and dashes.
        parameters: JSON schema of its arguments.
        is_strict: whether the schema must be enforced in full.
        is_lenient: whether keywords that llguidance does not know are ignored.
    """

    name: str
    parameters: Mapping[str, Any]
    is_strict: bool = False
    is_lenient: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """JSON schema of its arguments, which are an object."""
        return {"type": "object", **self.parameters}


def tool_call_grammar(
    tools: Sequence[ToolSpec],
    call_format: ToolCallFormat,
    *,
    encode_marker: MarkerEncoder,
    json_options: Mapping[str, Any],
    parallel: bool,
    alternative_schema: str | None = None,
) -> str:
    """Return the Lark grammar of tool calls.

    Args:
        tools: tools that may be called.
        call_format: format of the calls.
        encode_marker: returns the Lark terminal of a marker: a string or a special token.
        json_options: llguidance's options for JSON schemas.
        parallel: whether up to MAX_TOOL_CALLS calls are allowed instead of exactly one.
        alternative_schema: JSON schema, as JSON, of a text allowed in place of calls; None for
            none.
    """
    alternative = (
        f" | {_json_rule(json.loads(alternative_schema), json_options)}"
        if alternative_schema is not None
        else ""
    )
    bodies = [f"call_{index}" for index in range(len(tools))]
    rules = [
        f"start: calls{alternative}",
        f"calls: {_calls_rule(call_format, encode_marker, parallel=parallel)}",
        f"body: {' | '.join(bodies)}",
        *(
            f"{body}: {_call_rule(tool, call_format, json_options)}"
            for body, tool in zip(bodies, tools, strict=True)
        ),
    ]
    return "\n".join(rules)


def _calls_rule(
    call_format: ToolCallFormat, encode_marker: MarkerEncoder, *, parallel: bool
) -> str:
    repetition = f"{{0,{MAX_TOOL_CALLS - 1}}}"
    start_marker, end_marker = call_format.start_marker, call_format.end_marker
    if start_marker and not call_format.is_list:
        call = f'{encode_marker(start_marker)} "\\n" body "\\n" {encode_marker(end_marker)}'
        return f'{call} ("\\n" {call}){repetition}' if parallel else call
    separator = ", " if start_marker else "; "
    calls = f"body ({_quoted(separator)} body){repetition}" if parallel else "body"
    return f'{encode_marker(start_marker)} "[" {calls} "]"' if start_marker else calls


def _call_rule(tool: ToolSpec, call_format: ToolCallFormat, json_options: Mapping[str, Any]) -> str:
    head = f'{{"name": "{tool.name}", "{call_format.arguments_key}": '
    options = {**json_options, "lenient": True} if tool.is_lenient else json_options
    return f'{_quoted(head)} {_json_rule(tool.schema, options)} "}}"'


def _json_rule(schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': options}, allow_nan=False)}"


def _quoted(text: str) -> str:
    return json.dumps(text)
