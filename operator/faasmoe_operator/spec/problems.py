"""pydantic's findings in our words: field, what was got, what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from faasmoe_operator.spec.patterns import WORDS

MAX_SHOWN_CHARS = 80
KEY_TAG = "[key]"  # pydantic's, after a key that is itself at fault

_BOUNDS = {
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:.15g}",
    "less_than": "less than {lt:.15g}",
}

_EXPECTED = _BOUNDS | {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "literal_error": "{expected}",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "quantity": "{expected}",
    "rule_broken": "{expected}",
    "invalid_key": "a text as the key",
}


def describe(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return one line for each field that was refused, in the order of the file.

    Args:
        error: what pydantic found.
        root: the model that was read, to name its fields where an unknown one was given.
    """
    lines: dict[str, str] = {}
    alternatives: dict[str, dict[str, str]] = {}
    for detail in error.errors(include_url=False):
        path = _path(detail, root)
        if detail["type"] in ("missing", "extra_forbidden"):
            lines.setdefault(path, _presence(detail, path, root))
            continue
        found = alternatives.setdefault(path, {})
        found[detail["type"]] = _expected(detail)
        # Of a union, the member that the value nearly fits is the one to speak of.
        spoken = [found[kind] for kind in found if kind in _BOUNDS] or list(found.values())
        lines[path] = f"{path}: got {_got(detail)}, expected {' or '.join(spoken)}"
    return list(lines.values())


def _path(detail: ErrorDetails, root: type[BaseModel]) -> str:
    """Return the camelCase path, without the tags that pydantic adds for the parts of a union."""
    schema = root.model_json_schema(by_alias=True)
    node: Mapping[str, Any] | None = schema
    parts: list[str] = []
    for part in detail["loc"]:
        if (below := _below(node, part, schema)) is not None:
            parts.append(str(part))
            node = below
    if detail["type"] == "extra_forbidden" and str(detail["loc"][-1]) not in parts[-1:]:
        parts.append(str(detail["loc"][-1]))
    if detail["type"] == "rule_broken":
        parts.append(detail["ctx"]["field"])
    return ".".join(parts) or "document"


def _below(
    node: Mapping[str, Any] | None, part: str | int, schema: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Return the schema of a node's part; None if the part is a tag and not in the file."""
    if node is None or part == KEY_TAG:
        return None
    node = _resolved(node, schema)
    if isinstance(part, int):
        found: Any = node.get("items", True)
    else:
        values = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
        found = node.get("properties", {}).get(part, values[0])
    return {} if found is True else found or None


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a node refers to, or what it is if it is not null."""
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        else:
            node = next(entry for entry in node["anyOf"] if entry.get("type") != "null")
    return node


def _presence(detail: ErrorDetails, path: str, root: type[BaseModel]) -> str:
    if detail["type"] == "missing":
        return f"{path}: missing"
    siblings = _siblings(path.split(".")[:-1], root)
    near = difflib.get_close_matches(path.split(".")[-1], siblings, n=1)
    hint = f", did you mean {near[0]}?" if near else f", expected one of {', '.join(siblings)}"
    return f"{path}: unknown field{hint}"


def _siblings(parents: list[str], root: type[BaseModel]) -> list[str]:
    schema = root.model_json_schema(by_alias=True)
    node: Mapping[str, Any] | None = schema
    for name in parents:
        node = _below(node, int(name) if name.isdigit() else name, schema)
    return list(_resolved(node or {}, schema).get("properties", {}))


def _got(detail: ErrorDetails) -> str:
    value = detail["ctx"]["got"] if detail["type"] == "rule_broken" else detail["input"]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] == "string_pattern_mismatch":
        pattern = detail["ctx"]["pattern"]
        return WORDS.get(pattern, f"a text like {pattern}")
    template = _EXPECTED.get(detail["type"])
    if template is None:
        return detail["msg"]
    return template.format(**detail.get("ctx", {}))
