"""Validation errors as one line per field, and validation rules specific to a platform.

A line names the field, its value and what was expected. Fields that only one platform supports
cause a warning or an error on the other.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from faasmoe_operator.api.v1alpha1.base import PLATFORM_EXTENSION, ApiModel
from faasmoe_operator.api.v1alpha1.patterns import DESCRIPTIONS
from faasmoe_operator.api.v1alpha1.storage import FILE_SCHEME, OCI_SCHEME, PVC_SCHEME

if TYPE_CHECKING:
    from faasmoe_operator.api.v1alpha1.moemodel import MoEModel


MAX_SHOWN_CHARS = 80
KEY_TAG = "[key]"  # pydantic appends it to the path of an invalid key

_BOUND_MESSAGES = {
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:.15g}",
    "less_than": "less than {lt:.15g}",
}

_EXPECTED_BY_TYPE = _BOUND_MESSAGES | {
    "int_type": "an integer",
    "int_from_float": "an integer",
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


def format_validation_errors(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one line for each invalid field, in the order of the file.

    Args:
        error: pydantic's error.
        model: the model that was validated, for suggestions of field names.
    """
    lines: dict[str, str] = {}
    alternatives: dict[str, dict[str, str]] = {}
    for detail in error.errors(include_url=False):
        path = _field_path(detail, model)
        if detail["type"] in ("missing", "extra_forbidden"):
            lines.setdefault(path, _presence_error(detail, path, model))
            continue
        by_type = alternatives.setdefault(path, {})
        by_type[detail["type"]] = _format_expected(detail)
        # Of a union, report the member whose type matches if only its bounds are violated.
        expectations = [by_type[kind] for kind in by_type if kind in _BOUND_MESSAGES] or list(
            by_type.values()
        )
        lines[path] = f"{path}: got {_format_value(detail)}, expected {' or '.join(expectations)}"
    return list(lines.values())


def _field_path(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """Return the camelCase path, without the tags that pydantic adds for members of a union."""
    schema = model.model_json_schema(by_alias=True)
    node: Mapping[str, Any] | None = schema
    parts: list[str] = []
    for part in detail["loc"]:
        if (child := _child_schema(node, part, schema)) is not None:
            parts.append(str(part))
            node = child
    if detail["type"] == "extra_forbidden" and str(detail["loc"][-1]) not in parts[-1:]:
        parts.append(str(detail["loc"][-1]))
    if detail["type"] == "rule_broken":
        parts.append(detail["ctx"]["field"])
    return ".".join(parts) or "document"


def _child_schema(
    node: Mapping[str, Any] | None, part: str | int, schema: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Return the schema of a child node; None if `part` is a tag of pydantic."""
    if node is None or part == KEY_TAG:
        return None
    node = _resolve_refs(node, schema)
    if isinstance(part, int):
        child: Any = node.get("items", True)
    else:
        values = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
        child = node.get("properties", {}).get(part, values[0])
    return {} if child is True else child or None


def _resolve_refs(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow references and optional types of a node to their target."""
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        else:
            node = next(entry for entry in node["anyOf"] if entry.get("type") != "null")
    return node


def _presence_error(detail: ErrorDetails, path: str, model: type[BaseModel]) -> str:
    if detail["type"] == "missing":
        return f"{path}: missing"
    siblings = _sibling_fields(path.split(".")[:-1], model)
    close_matches = difflib.get_close_matches(path.split(".")[-1], siblings, n=1)
    hint = (
        f", did you mean {close_matches[0]}?"
        if close_matches
        else f", expected one of {', '.join(siblings)}"
    )
    return f"{path}: unknown field{hint}"


def _sibling_fields(parents: list[str], model: type[BaseModel]) -> list[str]:
    schema = model.model_json_schema(by_alias=True)
    node: Mapping[str, Any] | None = schema
    for name in parents:
        node = _child_schema(node, int(name) if name.isdigit() else name, schema)
    return list(_resolve_refs(node or {}, schema).get("properties", {}))


def _format_value(detail: ErrorDetails) -> str:
    value = detail["ctx"]["got"] if detail["type"] == "rule_broken" else detail["input"]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "…"


def _format_expected(detail: ErrorDetails) -> str:
    if detail["type"] == "string_pattern_mismatch":
        pattern = detail["ctx"]["pattern"]
        return DESCRIPTIONS.get(pattern, f"a text like {pattern}")
    template = _EXPECTED_BY_TYPE.get(detail["type"])
    if template is None:
        return detail["msg"]
    return template.format(**detail.get("ctx", {}))


def process_platform_warnings(model: MoEModel) -> list[str]:
    """Return warnings about settings that have no or an unwanted effect for `faasmoe up`.

    These are fields that only Kubernetes supports, and one function per sandbox on a GPU: the
    sandboxes of a machine share it, and each needs about 0.5 GB of it in addition to its functions.
    """
    fields = _fields_set_for_platform(model.spec, "spec", platform="kubernetes")
    warnings = [f"{field}: has no effect here, only Kubernetes supports it" for field in fields]
    experts = model.spec.experts
    if experts.device == "cuda" and experts.functions_per_sandbox == 1:
        warnings.append(
            "spec.experts.functionsPerSandbox: got 1 with device cuda: each sandbox needs about "
            "0.5 GB of the GPU in addition to its functions; more functions in one need less"
        )
    return warnings


def process_platform_problems(model: MoEModel) -> list[str]:
    """Return one line for each setting that `faasmoe up` cannot serve."""
    source = model.spec.model.source
    problems = []
    if source.startswith((PVC_SCHEME, OCI_SCHEME)):
        problems.append(
            f"spec.model.source: got {source!r}, expected hf://ORG/NAME or file://PATH: "
            "only Kubernetes has PersistentVolumeClaims and image volumes"
        )
    for index, tenant in enumerate(model.spec.tenants):
        if tenant.api_keys_path is None:
            problems.append(
                f"spec.tenants.{index}.apiKeysPath: missing: `faasmoe up` reads no Secret; create "
                "a folder with one file for each API key and set its path, relative to this file"
            )
    return problems


def kubernetes_problems(model: MoEModel) -> list[str]:
    """Return one line for each setting that Kubernetes cannot serve."""
    source = model.spec.model.source
    problems = [
        f"{field}: only `faasmoe up` supports it, expected none on Kubernetes"
        for field in _fields_set_for_platform(model.spec, "spec", platform="process")
    ]
    if source.startswith(FILE_SCHEME):
        expected = "hf://ORG/NAME, pvc://CLAIM/PATH or another source on Kubernetes"
        problems.insert(0, f"spec.model.source: got {source!r}, expected {expected}")
    for index, tenant in enumerate(model.spec.tenants):
        if tenant.api_keys_secret_ref is None:
            problems.append(
                f"spec.tenants.{index}.apiKeysSecretRef: missing: expected {{name: SECRET}}, a "
                "Secret whose every value is an API key"
            )
    return problems


def _fields_set_for_platform(model: ApiModel, path: str, *, platform: str) -> Iterator[str]:
    """Yield the paths of fields of one platform that differ from their defaults."""
    for name, field in type(model).model_fields.items():
        value, field_path = getattr(model, name), f"{path}.{field.alias}"
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get(PLATFORM_EXTENSION) == platform:
            if value != field.get_default(call_default_factory=True):
                yield field_path
        elif isinstance(value, ApiModel):
            yield from _fields_set_for_platform(value, field_path, platform=platform)
        elif isinstance(value, tuple):
            for index, entry in enumerate(value):
                if isinstance(entry, ApiModel):
                    yield from _fields_set_for_platform(
                        entry, f"{field_path}.{index}", platform=platform
                    )
