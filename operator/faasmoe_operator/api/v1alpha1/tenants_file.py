"""The tenants as the router reads them, whichever platform it runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from faasmoe_operator.api.v1alpha1.moemodel import MoEModel
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec

TENANTS_FILE_NAME = "tenants.json"
TENANTS_FILE_VERSION = 1


def build_tenants_file(
    model: MoEModel, keys_path: Callable[[TenantSpec], str], *, n_routers: int = 1
) -> dict[str, Any]:
    """Return what stands in the router's tenants file; limits that are not there do not limit.

    Args:
        model: whose tenants.
        keys_path: says in which folder the router finds the API keys of a tenant.
        n_routers: routers that read the file: each grants its part of the limits.
    """
    tenants = [_tenant_entry(tenant, keys_path(tenant)) for tenant in model.spec.tenants]
    return {
        "version": TENANTS_FILE_VERSION,
        "model": model.metadata.name,
        "routerReplicas": n_routers,
        "tenants": tenants,
    }


def _tenant_entry(tenant: TenantSpec, keys_path: str) -> dict[str, Any]:
    return {
        "name": tenant.name,
        "keysPath": keys_path,
        "weight": tenant.weight,
        "priority": tenant.priority,
        "modelAlias": tenant.model_alias,
        "systemPrompt": tenant.system_prompt,
        "sharePrefixCacheWith": list(tenant.share_prefix_cache_with),
        "limits": tenant.limits.to_object(),
    }
