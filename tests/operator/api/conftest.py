"""A fake Kubernetes API server that applies a CRD's defaults, schema and CEL rules to objects.

It needs no cluster, unlike the tests in tests/cluster. CEL is evaluated by cel-python, regular
expressions by RE2 and quantities by the Kubernetes client.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import celpy
import pytest
import re2  # type: ignore[import-untyped]
from celpy import celtypes
from celpy.adapter import json_to_cel
from kubernetes.utils.quantity import parse_quantity

from faasmoe_operator.api.v1alpha1.crd import build_crd
from faasmoe_operator.api.v1alpha1.tenant_crd import build_tenant_crd

Schema = dict[str, Any]
RULES = "x-kubernetes-validations"


def _compare(one: Any, other: Any) -> celtypes.IntType:
    return celtypes.IntType((one > other) - (one < other))


FUNCTIONS: dict[str, Any] = {
    "quantity": lambda text: celtypes.DoubleType(float(parse_quantity(str(text)))),
    "compareTo": _compare,
    "split": lambda text, by: celtypes.ListType(map(celtypes.StringType, text.split(by))),
}


@cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule), functions=FUNCTIONS)


class FakeApiServer:
    """Validates objects of one CRD."""

    def __init__(self, definition: dict[str, Any]) -> None:
        self.root: Schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]

    def defaulted(self, obj: dict[str, Any]) -> dict[str, Any]:
        """Return the object with all defaults."""
        stored: dict[str, Any] = _apply_defaults(self.root, copy.deepcopy(obj))
        return stored

    def problems(self, obj: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
        """Return the problems of an object; empty if it is valid.

        Args:
            obj: the new object.
            old: the existing object, if this is an update.
        """
        new = self.defaulted(obj)
        problems = list(_schema_problems(self.root, new, ""))
        before = None if old is None else self.defaulted(old)
        return problems or list(_rule_problems(self.root, new, before, ""))

    def rules(self) -> list[tuple[str, dict[str, Any]]]:
        """Return every CEL rule with its path."""
        return list(_rules(self.root, ""))


@pytest.fixture(scope="session")
def api_server() -> FakeApiServer:
    return FakeApiServer(build_crd())


@pytest.fixture(scope="session")
def tenant_api_server() -> FakeApiServer:
    return FakeApiServer(build_tenant_crd())


def children(schema: Schema) -> Iterator[tuple[str, Schema]]:
    yield from schema.get("properties", {}).items()
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield "*", schema[name]


def _rules(schema: Schema, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for rule in schema.get(RULES, []):
        yield path, rule
    for name, below in children(schema):
        yield from _rules(below, f"{path}.{name}")


def _apply_defaults(schema: Schema, value: Any) -> Any:
    if isinstance(value, dict):
        for name, field in schema.get("properties", {}).items():
            if name not in value and "default" in field:
                value[name] = copy.deepcopy(field["default"])
    for _, below, entry, key in _schema_entries(schema, value):
        value[key] = _apply_defaults(below, entry)
    return value


def _schema_entries(schema: Schema, value: Any) -> Iterator[tuple[str, Schema, Any, Any]]:
    """Yield name, schema, value and key of every child of a value that has a schema."""
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        for name, entry in value.items():
            if below := fields.get(name, schema.get("additionalProperties")):
                yield f".{name}", below, entry, name
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield f".{index}", schema["items"], entry, index


def _schema_problems(schema: Schema, value: Any, path: str) -> Iterator[str]:
    if not _is_typed(schema, value):
        yield f"{path}: wrong type"
        return
    if isinstance(value, dict):
        yield from _object_problems(schema, value, path)
    if isinstance(value, list):
        yield from _list_problems(schema, value, path)
    if isinstance(value, str):
        yield from _text_problems(schema, value, path)
    elif isinstance(value, int | float) and not _is_within(schema, value):
        yield f"{path}: out of bounds"
    for name, below, entry, _ in _schema_entries(schema, value):
        yield from _schema_problems(below, entry, path + name)


def _is_typed(schema: Schema, value: Any) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if "x-kubernetes-int-or-string" in schema:
        return is_int or isinstance(value, str)
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool}
    match schema["type"]:
        case "integer":
            return is_int
        case "number":
            return is_int or isinstance(value, float)
        case kind:
            return isinstance(value, kinds[kind])


def _object_problems(schema: Schema, value: dict[str, Any], path: str) -> Iterator[str]:
    yield from (
        f"{path}.{name}: missing" for name in schema.get("required", ()) if name not in value
    )
    if len(value) > schema.get("maxProperties", len(value)):
        yield f"{path}: too many"
    is_free = "x-kubernetes-preserve-unknown-fields" in schema or "additionalProperties" in schema
    if "properties" in schema and not is_free and path != ".metadata":
        yield from (f"{path}.{n}: unknown" for n in value if n not in schema["properties"])


def _list_problems(schema: Schema, value: list[Any], path: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{path}: too many or too few"
    keys = schema.get("x-kubernetes-list-map-keys", ())
    entry_keys = [tuple(entry[key] for key in keys) if keys else entry for entry in value]
    is_unique = all(entry not in entry_keys[:index] for index, entry in enumerate(entry_keys))
    if schema["x-kubernetes-list-type"] != "atomic" and not is_unique:
        yield f"{path}: duplicate entry"


def _text_problems(schema: Schema, value: str, path: str) -> Iterator[str]:
    if value not in schema.get("enum", (value,)):
        yield f"{path}: not one of {schema['enum']}"
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"{path}: too long or too short"
    if not re2.search(schema.get("pattern", ""), value):
        yield f"{path}: does not match {schema['pattern']}"


def _is_within(schema: Schema, value: float) -> bool:
    minimum = schema.get("minimum", value)
    is_above = value > minimum if schema.get("exclusiveMinimum") else value >= minimum
    return bool(is_above and value <= schema.get("maximum", value))


def _rule_problems(schema: Schema, value: Any, old: Any, path: str) -> Iterator[str]:
    for rule in schema.get(RULES, ()):
        if "oldSelf" in rule["rule"] and old is None:
            continue
        variables = {"self": _to_cel(schema, value)}
        if old is not None:
            variables["oldSelf"] = _to_cel(schema, old)
        if not _program(rule["rule"]).evaluate(variables):
            yield f"{path}{rule.get('fieldPath', '')}: {rule['message']}"
    for name, below, entry, key in _schema_entries(schema, value):
        before = old[key] if isinstance(old, dict) and key in old else None
        yield from _rule_problems(below, entry, before, path + name)


def _to_cel(schema: Schema, value: Any) -> Any:
    if schema.get("type") == "number":
        return celtypes.DoubleType(value)
    if isinstance(value, dict):
        entries = _schema_entries(schema, value)
        return celtypes.MapType(
            {celtypes.StringType(key): _to_cel(below, entry) for _, below, entry, key in entries}
        )
    if isinstance(value, list):
        return celtypes.ListType([_to_cel(schema["items"], entry) for entry in value])
    return json_to_cel(value)
