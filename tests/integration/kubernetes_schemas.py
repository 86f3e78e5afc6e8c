"""Strict validation against the JSON schemas of Kubernetes; unknown fields are errors."""

from collections.abc import Mapping
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest

VERSIONS = ("1.30", "1.37")
"""The oldest release that the chart supports, and the newest one."""
EXTENSIONS = frozenset({"HTTPRoute", "ServiceMonitor", "PodMonitor", "PrometheusRule", "MoEModel"})
"""Kinds that are not part of Kubernetes."""


def check_schema(obj: Mapping[str, Any]) -> None:
    """Fail if the object is invalid in any of VERSIONS."""
    if obj["kind"] in EXTENSIONS:
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(dict(obj), version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(str(part) for part in error.path)
            name = f"{obj['kind']} {obj['metadata']['name']}"
            pytest.fail(f"{name}: {place}: {error.message[:500]} (Kubernetes {version})")
