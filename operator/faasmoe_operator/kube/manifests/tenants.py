"""Tenants as the router reads them: one file, and a folder of keys for each.

The file is a ConfigMap and the folders are Secrets, both mounted, so that changed limits and keys
reach running routers. A Secret that is not there leaves an empty folder: the tenant has no keys.
"""

from __future__ import annotations

import json
from typing import Any

from faasmoe_operator.kube.kinds import CONFIG_MAP, Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.names import Component, shortened, tenants_name
from faasmoe_operator.kube.manifests.objects import new_object
from faasmoe_operator.spec.tenants import Tenant

FILE_NAME = "tenants.json"
FOLDER = "/etc/faasmoe/tenants"
KEYS_FOLDER = "/etc/faasmoe/keys"
FILE_VERSION = 1
FILE_MODE = 0o440


def tenants_config_map(ctx: ModelContext) -> Object:
    """Return the ConfigMap with the file."""
    text = json.dumps(tenants_document(ctx), indent=2, ensure_ascii=False)
    return new_object(
        ctx,
        CONFIG_MAP,
        tenants_name(ctx.name),
        component=Component.ROUTER,
        data={FILE_NAME: text + "\n"},
    )


def tenants_document(ctx: ModelContext) -> dict[str, Any]:
    """Return what stands in the file."""
    tenants = [_entry(tenant) for tenant in ctx.spec.tenants]
    return {"version": FILE_VERSION, "model": ctx.name, "tenants": tenants}


def tenants_volumes(ctx: ModelContext) -> list[Object]:
    """Return the router's volumes for the file and the keys."""
    source = {"name": tenants_name(ctx.name), "defaultMode": FILE_MODE}
    return [{"name": "tenants", "configMap": source}, *map(_keys_volume, _with_keys(ctx))]


def tenants_mounts(ctx: ModelContext) -> list[Object]:
    """Return where the router finds them."""
    return [
        {"name": "tenants", "mountPath": FOLDER, "readOnly": True},
        *(
            {"name": _volume_name(tenant), "mountPath": _keys_path(tenant), "readOnly": True}
            for tenant in _with_keys(ctx)
        ),
    ]


def _with_keys(ctx: ModelContext) -> list[Tenant]:
    return [tenant for tenant in ctx.spec.tenants if tenant.api_keys_secret_ref is not None]


def _entry(tenant: Tenant) -> dict[str, Any]:
    return {
        "name": tenant.name,
        "keysPath": _keys_path(tenant),
        "weight": tenant.weight,
        "priority": tenant.priority,
        "modelAlias": tenant.model_alias,
        "systemPrompt": tenant.system_prompt,
        "sharePrefixCacheWith": list(tenant.share_prefix_cache_with),
        "limits": tenant.limits.to_object(),
    }


def _keys_volume(tenant: Tenant) -> Object:
    assert tenant.api_keys_secret_ref is not None
    secret = tenant.api_keys_secret_ref.name
    source = {"secretName": secret, "optional": True, "defaultMode": FILE_MODE}
    return {"name": _volume_name(tenant), "secret": source}


def _keys_path(tenant: Tenant) -> str:
    return f"{KEYS_FOLDER}/{tenant.name}"


def _volume_name(tenant: Tenant) -> str:
    return shortened(f"keys-{tenant.name}")
