"""A grammar, in Lark's form, of texts that are nothing but calls of certain tools."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faasmoe_router.toolcalls.forms import CallForm

MAX_CALLS = 16

Mark = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called.

    Attributes:
        name: letters, digits, underscores and dashes.
        parameters: the JSON schema of its arguments.
    """

    name: str
    parameters: Mapping[str, Any]


def calls_grammar(
    tools: Sequence[Tool],
    form: CallForm,
    *,
    mark: Mark,
    json_options: Mapping[str, Any],
    many: bool,
    instead: str | None = None,
) -> str:
    """Return the grammar of one call, or of several.

    Args:
        tools: what may be called.
        form: how calls are written.
        mark: tells how a mark of the form is written in the grammar.
        json_options: llguidance's options for JSON.
        many: whether several calls may be made.
        instead: the schema, as JSON, of a JSON text that may come instead of calls, if one may.
    """
    other = f" | {_json(json.loads(instead), json_options)}" if instead is not None else ""
    bodies = [f"call_{index}" for index in range(len(tools))]
    rules = [
        f"start: calls{other}",
        f"calls: {_calls(form, mark, many=many)}",
        f"body: {' | '.join(bodies)}",
        *(
            f"{body}: {_body(tool, form, json_options)}"
            for body, tool in zip(bodies, tools, strict=True)
        ),
    ]
    return "\n".join(rules)


def _calls(form: CallForm, mark: Mark, *, many: bool) -> str:
    more = f"{{0,{MAX_CALLS - 1}}}"
    if form.begin and not form.listed:
        call = f'{mark(form.begin)} "\\n" body "\\n" {mark(form.end)}'
        return f'{call} ("\\n" {call}){more}' if many else call
    separator = ", " if form.begin else "; "
    calls = f"body ({_quoted(separator)} body){more}" if many else "body"
    return f'{mark(form.begin)} "[" {calls} "]"' if form.begin else calls


def _body(tool: Tool, form: CallForm, json_options: Mapping[str, Any]) -> str:
    head = f'{{"name": "{tool.name}", "{form.arguments}": '
    schema = {"type": "object", **tool.parameters}
    return f'{_quoted(head)} {_json(schema, json_options)} "}}"'


def _json(schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': options}, allow_nan=False)}"


def _quoted(text: str) -> str:
    return json.dumps(text)
