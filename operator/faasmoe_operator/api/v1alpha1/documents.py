"""Files with any number of MoEModels and Tenants, one YAML document each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from faasmoe_operator.api.v1alpha1.moemodel import KIND, MoEModel
from faasmoe_operator.api.v1alpha1.tenant import TENANT_KIND, Tenant
from faasmoe_operator.api.v1alpha1.validation import format_validation_errors
from faasmoe_operator.api.v1alpha1.yaml_documents import parse_documents, read_text
from faasmoe_operator.errors import MoEModelError

_KINDS: dict[str, type[MoEModel] | type[Tenant]] = {KIND: MoEModel, TENANT_KIND: Tenant}


def load_documents(path: Path) -> list[MoEModel | Tenant]:
    """Return the objects of a file; raises MoEModelError, which names file and document."""
    values = parse_documents(read_text(path), name=str(path))
    names = [f"{path} document {number}" for number in range(1, len(values) + 1)]
    if len(values) == 1:
        names = [str(path)]
    given = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    if not given:
        raise MoEModelError(str(path), ["document: got nothing, expected a mapping"])
    return [_parse(value, name) for name, value in given]


def _parse(value: Any, name: str) -> MoEModel | Tenant:
    if not isinstance(value, dict):
        raise MoEModelError(name, [f"document: got a {type(value).__name__}, expected a mapping"])
    kind = value.get("kind")
    if kind not in _KINDS:
        raise MoEModelError(name, [f"kind: got {kind!r}, expected {' or '.join(_KINDS)}"])
    try:
        return _KINDS[kind].model_validate(value)
    except ValidationError as error:
        raise MoEModelError(name, format_validation_errors(error, _KINDS[kind])) from error
