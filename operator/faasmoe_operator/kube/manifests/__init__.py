"""Manifests of the objects of a MoEModel, as plain dictionaries. Pure functions."""

from faasmoe_operator.kube.manifests.context import (
    ControlEndpoint,
    ControlSecrets,
    Images,
    ModelContext,
)
from faasmoe_operator.kube.manifests.model import missing_apis, serving_objects, store_objects
from faasmoe_operator.kube.manifests.networking import model_url, tenant_url
from faasmoe_operator.kube.manifests.sandbox import sandbox_pod, sandbox_template_hash

__all__ = [
    "ControlEndpoint",
    "ControlSecrets",
    "Images",
    "ModelContext",
    "missing_apis",
    "model_url",
    "sandbox_pod",
    "sandbox_template_hash",
    "serving_objects",
    "store_objects",
    "tenant_url",
]
