"""What only one of the platforms honours: told, or refused, on the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from faasmoe_operator.spec.base import Part
from faasmoe_operator.spec.extensions import PLATFORM
from faasmoe_operator.spec.model_source import CLAIM_SCHEME, FILE_SCHEME

if TYPE_CHECKING:
    from faasmoe_operator.spec.moemodel import MoEModel


def platform_notes(model: MoEModel) -> list[str]:
    """Return one line for each field that is given and that `faasmoe up` does not honour as meant.

    On one machine sandboxes share a GPU, and each takes some of it for itself.
    """
    fields = _given(model.spec, "spec", platform="kubernetes")
    notes = [f"{field}: has no effect here, only Kubernetes honours it" for field in fields]
    experts = model.spec.experts
    if experts.device == "cuda" and experts.functions_per_sandbox == 1:
        notes.append(
            "spec.experts.functionsPerSandbox: got 1 with device cuda: each sandbox takes about "
            "0.5 GB of the GPU beside its functions; more functions in one take less"
        )
    return notes


def process_problems(model: MoEModel) -> list[str]:
    """Return one line for each thing that `faasmoe up` cannot serve without."""
    source = model.spec.model.source
    problems = []
    if source.startswith(CLAIM_SCHEME):
        problems.append(
            f"spec.model.source: got {source!r}, expected hf://ORG/NAME or file://PATH: "
            "only Kubernetes has claims"
        )
    for index, tenant in enumerate(model.spec.tenants):
        if tenant.api_keys_path is None:
            problems.append(
                f"spec.tenants.{index}.apiKeysPath: missing: `faasmoe up` reads no Secret; make a "
                "folder with one file for each API key and name it here, relative to this file"
            )
    return problems


def kubernetes_problems(model: MoEModel) -> list[str]:
    """Return one line for each field that is given and that Kubernetes cannot honour."""
    source = model.spec.model.source
    problems = [
        f"{field}: only `faasmoe up` honours it, expected none on Kubernetes"
        for field in _given(model.spec, "spec", platform="process")
    ]
    if source.startswith(FILE_SCHEME):
        expected = "hf://ORG/NAME or pvc://CLAIM/PATH on Kubernetes"
        problems.insert(0, f"spec.model.source: got {source!r}, expected {expected}")
    for index, tenant in enumerate(model.spec.tenants):
        if tenant.api_keys_secret_ref is None:
            problems.append(
                f"spec.tenants.{index}.apiKeysSecretRef: missing: expected {{name: SECRET}}, a "
                "Secret whose every value is an API key"
            )
    return problems


def _given(part: Part, path: str, *, platform: str) -> Iterator[str]:
    """Yield the paths of fields of one platform that differ from their defaults."""
    for name, field in type(part).model_fields.items():
        value, place = getattr(part, name), f"{path}.{field.alias}"
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get(PLATFORM) == platform:
            if value != field.get_default(call_default_factory=True):
                yield place
        elif isinstance(value, Part):
            yield from _given(value, place, platform=platform)
        elif isinstance(value, tuple):
            for index, entry in enumerate(value):
                if isinstance(entry, Part):
                    yield from _given(entry, f"{place}.{index}", platform=platform)
