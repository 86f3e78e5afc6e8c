"""The router's tenants file, which is the same on all platforms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from faasmoe_operator.api.v1alpha1.tenants import TenantSpec

TENANTS_FILE_NAME = "tenants.json"
TENANTS_FILE_VERSION = 1


def build_tenants_file(
    model: str,
    tenants: Iterable[TenantSpec],
    keys_path: Callable[[TenantSpec], str],
    *,
    n_routers: int = 1,
) -> dict[str, Any]:
    """Return the content of the router's tenants file; an omitted limit is no limit.

    Args:
        model: name of the model.
        tenants: its tenants.
        keys_path: returns the folder of a tenant's API keys, as the router sees it.
        n_routers: number of routers that read the file; each grants its share of the limits.
    """
    return {
        "version": TENANTS_FILE_VERSION,
        "model": model,
        "routerReplicas": n_routers,
        "tenants": [_tenant_entry(tenant, keys_path(tenant)) for tenant in tenants],
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
