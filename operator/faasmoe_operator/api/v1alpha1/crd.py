"""Generates the CustomResourceDefinition of the MoEModel from its pydantic models.

The API server validates what pydantic validates: types and bounds by the schema, rules over several
fields by CEL (`base.py`). Defaults are part of the schema, so that an object shows the effective
values. A structural schema is a subset of JSON Schema: it has no references, no unions but "integer
or string", and a flag for exclusive bounds. Keywords next to a pydantic reference (description,
rules, default) override those of its target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from faasmoe_operator.api.v1alpha1.base import (
    PLATFORM_EXTENSION,
    PROCESS_ONLY,
    VALIDATIONS,
    cel_rule,
)
from faasmoe_operator.api.v1alpha1.moemodel import API_VERSION, KIND, MoEModelSpec
from faasmoe_operator.api.v1alpha1.patterns import DNS_1035_LABEL
from faasmoe_operator.api.v1alpha1.status import MoEModelStatus

INT_OR_STRING = "x-kubernetes-int-or-string"
PRESERVE_UNKNOWN_FIELDS = "x-kubernetes-preserve-unknown-fields"
LIST_TYPE = "x-kubernetes-list-type"
INT32_MAX = (1 << 31) - 1

_COPIED_KEYWORDS = (
    "description", "format", "enum", "pattern", "minLength", "maxLength", "minimum", "maximum",
    "minItems", "maxItems", "maxProperties", LIST_TYPE, "x-kubernetes-list-map-keys", VALIDATIONS,
)  # fmt: skip

Schema = dict[str, Any]


def structural_schema(model: type[BaseModel]) -> Schema:
    """Return the structural schema of a model, without fields of the process platform only."""
    schema = model.model_json_schema(by_alias=True)
    return _convert(schema, schema.get("$defs", {}))


def _convert(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    node = _inline_refs(node, definitions)
    copied = {name: node[name] for name in _COPIED_KEYWORDS if name in node}
    default = {"default": node["default"]} if node.get("default") not in (None, [], {}) else {}
    return _type_schema(node, definitions) | copied | default


def _inline_refs(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    """Replace references and optional types in a node by their targets."""
    node = dict(node)
    while "$ref" in node or _unwrap_optional(node) is not None:
        if "$ref" in node:
            referenced = definitions[node.pop("$ref").rpartition("/")[2]]
        else:
            referenced = _unwrap_optional(node)
            del node["anyOf"]
        rules = [*referenced.get(VALIDATIONS, []), *node.get(VALIDATIONS, [])]
        node = {**referenced, **node} | ({VALIDATIONS: rules} if rules else {})
    return node


def _unwrap_optional(node: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the type of an optional field; None if the node is not optional."""
    members = [member for member in node.get("anyOf", ()) if member.get("type") != "null"]
    return members[0] if len(members) == 1 else None


def _type_schema(node: Schema, definitions: Mapping[str, Any]) -> Schema:
    """Return the type of a node with its properties or items."""
    if "anyOf" in node:
        return _int_or_keyword(node["anyOf"])
    if INT_OR_STRING in node:
        return _int_or_string()
    match node["type"]:
        case "object":
            return _object_schema(node, definitions)
        case "array":
            items = _convert(node["items"], definitions)
            return {"type": "array", "items": items, LIST_TYPE: "atomic"}
        case "string" if "const" in node:
            return {"type": "string", "enum": [node["const"]]}
        case "integer":
            is_small = node.get("maximum", INT32_MAX + 1) <= INT32_MAX
            return {"type": "integer", "format": "int32" if is_small else "int64"}
        case "number":
            return {"type": "number"} | _exclusive_minimum(node)
    return {"type": node["type"]}


def _object_schema(node: Schema, definitions: Mapping[str, Any]) -> Schema:
    if node.get(PRESERVE_UNKNOWN_FIELDS):
        return {"type": "object", PRESERVE_UNKNOWN_FIELDS: True}
    if "properties" not in node:
        (values,) = node.get("patternProperties", {"": node.get("additionalProperties")}).values()
        return {"type": "object", "additionalProperties": _convert(values, definitions)}
    fields = {
        name: field
        for name, field in node["properties"].items()
        if field.get(PLATFORM_EXTENSION) != PROCESS_ONLY[PLATFORM_EXTENSION]
    }
    required = node.get("required", [])
    properties = {name: _convert(field, definitions) for name, field in fields.items()}
    for name, field in fields.items():
        has_default_factory = "default" not in field and name not in required
        if has_default_factory and (defaults := _defaults(properties[name])):
            properties[name]["default"] = defaults
    return {"type": "object", "properties": properties} | (
        {"required": required} if required else {}
    )


def _defaults(schema: Schema) -> Schema:
    """Return an object with all defaults of its fields, so that rules apply to them as well."""
    fields = schema.get("properties", {}).items()
    return {name: field["default"] for name, field in fields if "default" in field}


def _int_or_string() -> Schema:
    return {INT_OR_STRING: True, "anyOf": [{"type": "integer"}, {"type": "string"}]}


def _int_or_keyword(members: list[Schema]) -> Schema:
    """Return the union of a bounded integer and one keyword, the only union that a CRD allows."""
    number, keyword = sorted(members, key=lambda member: str(member["type"]))
    bounds = {name: number[name] for name in ("minimum", "maximum")}
    text = {"pattern": f"^{keyword['const']}$", "maxLength": len(keyword["const"])}
    return _int_or_string() | bounds | text


def _exclusive_minimum(node: Schema) -> Schema:
    """Return an exclusive lower bound in OpenAPI v3.0 form: a bound and a flag."""
    if "exclusiveMinimum" not in node:
        return {}
    return {"minimum": node["exclusiveMinimum"], "exclusiveMinimum": True}


PLURAL = "moemodels"
GROUP, VERSION = API_VERSION.split("/")
CRD_NAME = f"{PLURAL}.{GROUP}"
CRD_FILE_NAME = f"{GROUP}_{PLURAL}.yaml"
MAX_NAME_CHARS = 63
FILE_HEADER = (
    "# Generated by `faasmoe crd` from the models in operator/faasmoe_operator/api/v1alpha1.\n"
)

_READY = '.status.conditions[?(@.type=="Ready")]'
_WIDE_COLUMNS = (
    ("Routers", "integer", ".status.router.readyReplicas", "ready routers", 1),
    ("Sandboxes", "integer", ".status.sandboxes.ready", "ready sandboxes", 1),
    ("Dtype", "string", ".status.model.dtype", "type of the stored weights", 1),
    ("Message", "string", f"{_READY}.message", "message of the Ready condition", 1),
)
"""Columns of `kubectl get -o wide`: those with a priority above 0."""
_PRINTER_COLUMNS = (
    ("URL", "string", ".status.url", "OpenAI base URL without /v1"),
    ("Model", "string", ".spec.model.source", "source of the checkpoint"),
    ("Ready", "string", f"{_READY}.status", "whether the model serves requests"),
    ("Reason", "string", f"{_READY}.reason", "reason of the Ready condition"),
    ("Functions", "integer", ".status.functions.total", "number of expert functions"),
    ("Active", "integer", ".status.functions.active", "functions with a ready replica"),
    *_WIDE_COLUMNS,
    ("Age", "date", ".metadata.creationTimestamp", "time since creation"),
)


def build_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": CRD_NAME, "labels": {"app.kubernetes.io/part-of": "faasmoe"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["moem"],
                "categories": ["moe"],
            },
            "versions": [_version_schema()],
        },
    }


def render_crd_yaml(definition: Mapping[str, Any] | None = None) -> str:
    """Return a CustomResourceDefinition, the MoEModel's if none is given, as YAML with a header."""
    definition = build_crd() if definition is None else definition
    return FILE_HEADER + yaml.dump(definition, Dumper=_NoAliasDumper, sort_keys=False, width=100)


def _version_schema() -> dict[str, Any]:
    names = ("name", "type", "jsonPath", "description", "priority")
    columns = [dict(zip(names, column, strict=False)) for column in _PRINTER_COLUMNS]
    return {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": columns,
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.router.replicas",
                "statusReplicasPath": ".status.router.replicas",
                "labelSelectorPath": ".status.router.selector",
            },
        },
        "schema": {"openAPIV3Schema": _model_schema()},
    }


def root_schema(description: str, name: str, **parts: Schema) -> dict[str, Any]:
    """Return the schema of a kind of objects.

    Args:
        description: what one is.
        name: what the name of one is.
        parts: schemas of spec, and of status if it has one.
    """
    return {
        "description": description,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"description": "Version of the API.", "type": "string"},
            "kind": {"description": "Kind of the object.", "type": "string"},
            # The API server describes metadata itself and rejects a description of it.
            "metadata": {
                "type": "object",
                "properties": {
                    "name": {"description": name, "type": "string", "maxLength": MAX_NAME_CHARS}
                },
            },
            **parts,
        },
    }


def _model_schema() -> dict[str, Any]:
    name_rule = cel_rule(
        f"self.metadata.name.matches(r'{DNS_1035_LABEL}')",
        "expected metadata.name to be lowercase letters, digits and '-', a letter first: Services "
        "are named after it",
    )
    schema = root_schema(
        "A Mixture-of-Experts model and how it is served.",
        "Name of the model.",
        spec=structural_schema(MoEModelSpec),
        status=structural_schema(MoEModelStatus),
    )
    return schema | {VALIDATIONS: [name_rule]}


class _NoAliasDumper(yaml.SafeDumper):
    """Writes equal values in full instead of as YAML aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
