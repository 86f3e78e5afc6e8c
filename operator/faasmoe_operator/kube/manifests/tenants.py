"""Tenants as the router reads them: one file, and a folder of keys for each.

The file is a ConfigMap and the folders are Secrets, both mounted, so that changed limits and keys
reach running routers. A Secret that is not there leaves an empty folder: the tenant has no keys.
"""

from __future__ import annotations

import json

from faasmoe_operator.kube.kinds import CONFIG_MAP, Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.names import Component, shortened, tenants_name
from faasmoe_operator.kube.manifests.objects import new_object
from faasmoe_operator.spec.tenants import Tenant
from faasmoe_operator.spec.tenants_document import FILE_NAME, tenants_document

FOLDER = "/etc/faasmoe/tenants"
KEYS_FOLDER = "/etc/faasmoe/keys"
FILE_MODE = 0o440


def tenants_config_map(ctx: ModelContext) -> Object:
    """Return the ConfigMap with the file."""
    # The number of routers stands in the file, not in their pods: scaling replaces none of them.
    n_routers = max(1, ctx.spec.router.replicas)
    document = tenants_document(ctx.model, _keys_path, n_routers=n_routers)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return new_object(
        ctx,
        CONFIG_MAP,
        tenants_name(ctx.name),
        component=Component.ROUTER,
        data={FILE_NAME: text + "\n"},
    )


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


def _keys_volume(tenant: Tenant) -> Object:
    assert tenant.api_keys_secret_ref is not None
    secret = tenant.api_keys_secret_ref.name
    source = {"secretName": secret, "optional": True, "defaultMode": FILE_MODE}
    return {"name": _volume_name(tenant), "secret": source}


def _keys_path(tenant: Tenant) -> str:
    return f"{KEYS_FOLDER}/{tenant.name}"


def _volume_name(tenant: Tenant) -> str:
    return shortened(f"keys-{tenant.name}")
