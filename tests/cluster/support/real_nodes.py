"""Finds nodes that run containers: neither the fake node nor hollow ones."""

from __future__ import annotations

import os
from dataclasses import dataclass

from apiserver import ApiServer, Object

HOSTNAME_LABEL = "kubernetes.io/hostname"
DEFAULT_CLASS_ANNOTATION = "storageclass.kubernetes.io/is-default-class"


@dataclass(frozen=True, slots=True)
class ProjectImages:
    """The project's images, which the node must have or can pull.

    Attributes:
        operator: image of the operator.
        router: image of routers and the store Job.
        expert: image of sandboxes.
        gateway: image of gateways.
    """

    operator: str
    router: str
    expert: str
    gateway: str

    @classmethod
    def from_environment(cls) -> ProjectImages | str:
        """Return the images named in the environment, or the first variable that is not set."""
        names = {part: f"TEST_{part.upper()}_IMAGE" for part in cls.__slots__}
        missing = [name for name in names.values() if not os.environ.get(name)]
        return missing[0] if missing else cls(**{p: os.environ[n] for p, n in names.items()})


def find_real_node(api: ApiServer) -> str | None:
    """Return the host name of a ready node that runs containers; None if there is none."""
    return next(
        (n["metadata"]["labels"][HOSTNAME_LABEL] for n in api.list("nodes") if _is_real(n)), None
    )


def has_default_storage(api: ApiServer) -> bool:
    """Return whether there is a default StorageClass."""
    classes = [found["metadata"].get("annotations", {}) for found in api.list("storageclasses")]
    return any(notes.get(DEFAULT_CLASS_ANNOTATION) == "true" for notes in classes)


def _is_real(node: Object) -> bool:
    status, spec = node.get("status", {}), node.get("spec", {})
    runtime = status.get("nodeInfo", {}).get("containerRuntimeVersion", "")
    is_ready = any(
        c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", [])
    )
    is_open = not spec.get("unschedulable") and not spec.get("taints")
    return is_ready and is_open and bool(runtime) and not runtime.startswith("fake")
