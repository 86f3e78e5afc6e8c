"""Nodes that run containers: not the suite's stand-in, not a hollow one."""

from __future__ import annotations

import os
from dataclasses import dataclass

from apiserver import ApiServer, Object

HOSTNAME_LABEL = "kubernetes.io/hostname"
DEFAULT_CLASS_ANNOTATION = "storageclass.kubernetes.io/is-default-class"


@dataclass(frozen=True, slots=True)
class ProjectImages:
    """The project's images, as a node can have them.

    Attributes:
        operator: of the operator.
        router: of routers and of the store's Job.
        expert: of sandboxes.
    """

    operator: str
    router: str
    expert: str

    @classmethod
    def from_environment(cls) -> ProjectImages | str:
        """Return the images that the environment names, or the first variable that is not set."""
        names = {part: f"TEST_{part.upper()}_IMAGE" for part in cls.__slots__}
        missing = [name for name in names.values() if not os.environ.get(name)]
        return missing[0] if missing else cls(**{p: os.environ[n] for p, n in names.items()})


def find_real_node(api: ApiServer) -> str | None:
    """Return the host name of a node that is ready and runs containers; None without one."""
    return next(
        (n["metadata"]["labels"][HOSTNAME_LABEL] for n in api.list("nodes") if _is_real(n)), None
    )


def has_default_storage(api: ApiServer) -> bool:
    """Return whether claims without a storage class get a volume."""
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
