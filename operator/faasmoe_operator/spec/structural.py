"""pydantic models to structural schemas, the form of JSON Schema that a CRD is written in.

No references and no unions but "whole number or text", one map type, one flag for exclusive bounds;
what pydantic says beside a reference (description, rules, default) goes over what it refers to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from faasmoe_operator.spec.extensions import PLATFORM, PROCESS_ONLY, VALIDATIONS

INT_OR_STRING = "x-kubernetes-int-or-string"
PRESERVE = "x-kubernetes-preserve-unknown-fields"
LIST_TYPE = "x-kubernetes-list-type"
INT32_MAX = (1 << 31) - 1

_KEPT = (
    "description", "format", "enum", "pattern", "minLength", "maxLength", "minimum", "maximum",
    "minItems", "maxItems", "maxProperties", LIST_TYPE, "x-kubernetes-list-map-keys", VALIDATIONS,
)  # fmt: skip

Schema = dict[str, Any]


def structural_schema(model: type[BaseModel]) -> Schema:
    """Return the structural schema of a model, without what the process platform alone honours."""
    schema = model.model_json_schema(by_alias=True)
    return _convert(schema, schema.get("$defs", {}))


def _convert(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    node = _inlined(node, definitions)
    kept = {name: node[name] for name in _KEPT if name in node}
    default = {"default": node["default"]} if node.get("default") not in (None, [], {}) else {}
    return _typed(node, definitions) | kept | default


def _inlined(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    """Return a node with what it refers to, or what it is unless null, in its place."""
    node = dict(node)
    while "$ref" in node or _without_null(node) is not None:
        if "$ref" in node:
            below = definitions[node.pop("$ref").rpartition("/")[2]]
        else:
            below = _without_null(node)
            del node["anyOf"]
        rules = [*below.get(VALIDATIONS, []), *node.get(VALIDATIONS, [])]
        node = {**below, **node} | ({VALIDATIONS: rules} if rules else {})
    return node


def _without_null(node: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the one member of a union that is not null; None for what is no such union."""
    members = [member for member in node.get("anyOf", ()) if member.get("type") != "null"]
    return members[0] if len(members) == 1 else None


def _typed(node: Schema, definitions: Mapping[str, Any]) -> Schema:
    """Return the type of a node, with what is within it."""
    if "anyOf" in node:
        return _number_or_word(node["anyOf"])
    if INT_OR_STRING in node:
        return _int_or_string()
    match node["type"]:
        case "object":
            return _object(node, definitions)
        case "array":
            items = _convert(node["items"], definitions)
            return {"type": "array", "items": items, LIST_TYPE: "atomic"}
        case "string" if "const" in node:
            return {"type": "string", "enum": [node["const"]]}
        case "integer":
            is_small = node.get("maximum", INT32_MAX + 1) <= INT32_MAX
            return {"type": "integer", "format": "int32" if is_small else "int64"}
        case "number":
            return {"type": "number"} | _exclusive(node)
    return {"type": node["type"]}


def _object(node: Schema, definitions: Mapping[str, Any]) -> Schema:
    if node.get(PRESERVE):
        return {"type": "object", PRESERVE: True}
    if "properties" not in node:
        (values,) = node.get("patternProperties", {"": node.get("additionalProperties")}).values()
        return {"type": "object", "additionalProperties": _convert(values, definitions)}
    fields = {
        name: field
        for name, field in node["properties"].items()
        if field.get(PLATFORM) != PROCESS_ONLY[PLATFORM]
    }
    required = node.get("required", [])
    properties = {name: _convert(field, definitions) for name, field in fields.items()}
    for name, field in fields.items():
        is_always_made = "default" not in field and name not in required
        if is_always_made and (defaults := _defaults(properties[name])):
            properties[name]["default"] = defaults
    return {"type": "object", "properties": properties} | (
        {"required": required} if required else {}
    )


def _defaults(schema: Schema) -> Schema:
    """Return a part with its defaults, all written out: rules are checked of them as they stand."""
    fields = schema.get("properties", {}).items()
    return {name: field["default"] for name, field in fields if "default" in field}


def _int_or_string() -> Schema:
    return {INT_OR_STRING: True, "anyOf": [{"type": "integer"}, {"type": "string"}]}


def _number_or_word(members: list[Schema]) -> Schema:
    """Return the union of a bounded whole number and one word; the API server knows no other."""
    number, word = sorted(members, key=lambda member: str(member["type"]))
    bounds = {name: number[name] for name in ("minimum", "maximum")}
    text = {"pattern": f"^{word['const']}$", "maxLength": len(word["const"])}
    return _int_or_string() | bounds | text


def _exclusive(node: Schema) -> Schema:
    """Say an exclusive lower bound as a CRD does: a bound and a flag."""
    if "exclusiveMinimum" not in node:
        return {}
    return {"minimum": node["exclusiveMinimum"], "exclusiveMinimum": True}
