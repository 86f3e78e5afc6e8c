"""Minimal Kubernetes objects for tests."""

import itertools
from typing import Any

from faasmoe_operator.kube.types import Kind, Object

_versions = itertools.count(1000)


def make_object(
    kind: Kind,
    name: str,
    *,
    namespace: str = "llm",
    uid: str | None = None,
    version: int | None = None,
    owner: str | None = None,
    labels: dict[str, str] | None = None,
    **rest: Any,
) -> Object:
    """Return an object as the API server returns it, with a newer version than all before."""
    metadata: Object = {
        "name": name,
        "namespace": namespace,
        "uid": uid or f"uid-{kind.name}-{namespace}-{name}",
        "resourceVersion": str(version or next(_versions)),
        "creationTimestamp": "2026-09-01T12:00:00Z",
        "labels": labels or {},
    }
    if owner is not None:
        metadata["ownerReferences"] = [
            {"apiVersion": "x/v1", "kind": "X", "name": "x", "uid": owner, "controller": True}
        ]
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **rest}
