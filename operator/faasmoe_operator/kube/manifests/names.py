"""Names, labels and selectors of everything that belongs to a MoEModel.

Names are `MODEL-PART`. Kubernetes allows at most 63 characters; a longer name is cut and ends with
a hash of the whole.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

FIELD_MANAGER = "faasmoe-operator"
MAX_NAME_CHARS = 63
HASH_CHARS = 8

MODEL_LABEL = "faasmoe.dev/model"
TENANT_LABEL = "faasmoe.dev/tenant"
TEMPLATE_LABEL = "faasmoe.dev/template"
POOL_LABEL = "faasmoe.dev/pool"
FUNCTION_LABEL = "faasmoe.dev/function"
FUNCTIONS_ANNOTATION = "faasmoe.dev/functions"
COMPONENT_LABEL = "app.kubernetes.io/component"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"

MODELS_TLS_SECRET = "faasmoe-models-tls"
"""Name of the Secret with the certificate of a namespace's models that the operator issues."""


class Component(StrEnum):
    """The component of a model that an object belongs to."""

    ROUTER = "router"
    SANDBOX = "sandbox"
    STORE = "store"
    STORE_SERVER = "store-server"
    CONTROL = "control"


class Pool(StrEnum):
    """Whether a sandbox is generic or holds functions."""

    WARM = "warm"
    ASSIGNED = "assigned"


def model_labels(model: str, component: Component | None = None) -> dict[str, str]:
    """Return the labels of an object of this model."""
    component_label = {} if component is None else {COMPONENT_LABEL: component.value}
    return {
        "app.kubernetes.io/name": "faasmoe",
        "app.kubernetes.io/instance": model,
        "app.kubernetes.io/part-of": "faasmoe",
        MANAGED_BY_LABEL: FIELD_MANAGER,
        MODEL_LABEL: model,
        **component_label,
    }


def pod_selector(model: str, component: Component | None = None) -> dict[str, str]:
    """Return the label selector of this model's pods; it must never change."""
    return {
        MODEL_LABEL: model,
        **({} if component is None else {COMPONENT_LABEL: component.value}),
    }


def pod_selector_text(model: str, component: Component | None = None) -> str:
    """Return the selector in the format of the API's `labelSelector`."""
    return ",".join(f"{key}={value}" for key, value in pod_selector(model, component).items())


def store_name(model: str) -> str:
    """Return the name of the store's claim, Job, ServiceAccount and NetworkPolicy."""
    return truncate_name(f"{model}-store")


def store_server_name(model: str) -> str:
    """Return the name of the store server's Deployment, Service, ServiceAccount and policy."""
    return truncate_name(_as_dns_1035_label(f"{model}-store-server"))


def router_name(model: str) -> str:
    """Return the name of the router Deployment and its ServiceAccount, budget and policy."""
    return truncate_name(f"{model}-router")


def sandbox_name(model: str, suffix: str = "") -> str:
    """Return the name of a sandbox pod; without a suffix, of what all sandboxes share."""
    ending = f"-{suffix}" if suffix else ""
    return truncate_name(f"{model}-sandbox", limit=MAX_NAME_CHARS - len(ending)) + ending


def default_deny_name(model: str) -> str:
    """Return the name of the NetworkPolicy that denies all traffic by default."""
    return truncate_name(f"{model}-default-deny")


def control_name(model: str, digest: str) -> str:
    """Return the name of the control Secret of a token with this digest."""
    return truncate_name(f"{model}-control-{digest[:HASH_CHARS]}")


def tenants_config_map_name(model: str) -> str:
    """Return the name of the ConfigMap with the router's tenants file."""
    return truncate_name(f"{model}-tenants")


def popularity_config_map_name(model: str) -> str:
    """Return the name of the ConfigMap that persists the popularity of functions."""
    return truncate_name(f"{model}-popularity")


def usage_config_map_name(model: str) -> str:
    """Return the name of the ConfigMap that persists the tenants' usage."""
    return truncate_name(f"{model}-accounts")


def service_name(model: str) -> str:
    """Return the name of the model's Service, Ingress and HTTPRoute."""
    return truncate_name(_as_dns_1035_label(model))


def tenant_service_name(model: str, tenant: str) -> str:
    """Return the name of a tenant's Service and HTTPRoute."""
    return truncate_name(f"{_as_dns_1035_label(model)}-tenant-{tenant}")


def truncate_name(name: str, *, limit: int = MAX_NAME_CHARS) -> str:
    """Return the name; one that is too long is cut and ends with a hash of the whole."""
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:HASH_CHARS]
    return f"{name[: limit - HASH_CHARS - 1].rstrip('-')}-{digest}"


def _as_dns_1035_label(model: str) -> str:
    # Service names must be RFC 1035 labels, which do not start with a digit.
    return f"moe-{model}" if model[0].isdigit() else model
