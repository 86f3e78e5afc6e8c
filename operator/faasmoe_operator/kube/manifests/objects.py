"""What all objects of a MoEModel have in common: kind, name, labels, owner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from faasmoe_operator.kube.kinds import Kind, Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.names import Component, labels


def new_object(
    ctx: ModelContext,
    kind: Kind,
    name: str,
    *,
    component: Component | None = None,
    more_labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    owned: bool = True,
    **body: Any,
) -> Object:
    """Return an object of this model.

    Args:
        ctx: the model.
        kind: what it is.
        name: its name.
        component: the part of the model that it belongs to.
        more_labels: labels beside those of every object.
        annotations: its annotations.
        owned: whether it goes when the MoEModel goes.
        body: all but kind and metadata.
    """
    metadata: Object = {
        "name": name,
        "namespace": ctx.namespace,
        "labels": {**labels(ctx.name, component), **(more_labels or {})},
    }
    if annotations:
        metadata["annotations"] = dict(annotations)
    if owned:
        metadata["ownerReferences"] = [ctx.owner_reference]
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **body}
