"""The router reads the tenants file that the control plane writes."""

from __future__ import annotations

import json
from typing import Any

from faasmoe_operator.api.v1alpha1.moemodel import MoEModel
from faasmoe_operator.api.v1alpha1.tenants_file import build_tenants_file
from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.tenants.registry import TenantsConfig

LIMITS = {
    "requestsPerMinute": 600,
    "tokensPerMinute": 200_000,
    "maxConcurrentRequests": 16,
    "maxQueuedRequests": 0,
    "maxModelLen": 4096,
    "maxOutputTokens": 512,
}


def write_and_read(*tenants: dict[str, Any]) -> TenantsConfig:
    model = MoEModel.from_object(
        {
            "apiVersion": "faasmoe.dev/v1alpha1",
            "kind": "MoEModel",
            "metadata": {"name": "demo", "namespace": "llm"},
            "spec": {"model": {"source": "hf://a/b"}, "tenants": list(tenants)},
        }
    )
    document = build_tenants_file(
        model.metadata.name, model.spec.tenants, lambda tenant: f"/keys/{tenant.name}"
    )
    return TenantsConfig.loads(json.dumps(document).encode())


def test_router_reads_every_field() -> None:
    acme = {
        "name": "acme",
        "apiKeysSecretRef": {"name": "acme-keys"},
        "weight": 1000,
        "priority": -10,
        "modelAlias": "acme-chat",
        "systemPrompt": "x" * 8192,
        "sharePrefixCacheWith": ["beta"],
        "limits": LIMITS,
    }
    config = write_and_read(acme, {"name": "beta", "apiKeysSecretRef": {"name": "b"}})
    assert config.model == "demo"
    tenant, other = config.tenants
    assert tenant.share() == Share(weight=1000, priority=-10, max_running=16, max_queued=0)
    assert tenant.limits.model_dump(by_alias=True) == LIMITS
    assert (tenant.model_alias, tenant.system_prompt) == ("acme-chat", "x" * 8192)
    assert (tenant.share_prefix_cache_with, tenant.keys_path) == (["beta"], "/keys/acme")
    assert other.share() == Share()
    assert set(other.limits.model_dump().values()) == {None}
