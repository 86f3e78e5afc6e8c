from __future__ import annotations

import json
from typing import Any

import pytest

from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.errors import TenantsConfigError
from faasmoe_router.tenants.registry import TenantConfig, TenantsConfig

ACME = {"name": "acme", "keysPath": "/keys/acme"}


def document(*tenants: Any, **fields: Any) -> bytes:
    return json.dumps({"version": 1, "model": "m", "tenants": list(tenants), **fields}).encode()


def test_reads_a_file_as_the_operator_writes_it() -> None:
    value = {
        **ACME,
        "weight": 2,
        "priority": -1,
        "modelAlias": "acme-chat",
        "systemPrompt": None,
        "sharePrefixCacheWith": ["beta"],
        "limits": {
            "requestsPerMinute": 600,
            "tokensPerMinute": 200_000,
            "maxConcurrentRequests": 16,
            "maxQueuedRequests": 0,
            "maxModelLen": 4096,
            "maxOutputTokens": 512,
        },
    }
    (tenant,) = TenantsConfig.loads(document(value, routerReplicas=3)).tenants
    assert (tenant.name, str(tenant.keys_folder)) == ("acme", "/keys/acme")
    assert tenant.share() == Share(weight=2, priority=-1, max_running=16, max_queued=0)
    assert tenant.limits.max_output_tokens == 512
    assert tenant.share_prefix_cache_with == ["beta"]


def test_absent_limits_are_unlimited() -> None:
    read = TenantsConfig.loads(document(ACME))
    assert read.router_replicas is None
    assert read.tenants[0].share() == Share()
    assert set(read.tenants[0].limits.model_dump().values()) == {None}


def test_limits_are_split_over_routers_and_rounded_up() -> None:
    limits = {"maxConcurrentRequests": 4, "maxQueuedRequests": 1}
    tenant = TenantConfig.model_validate({**ACME, "limits": limits})
    assert tenant.share(n_routers=3) == Share(max_running=2, max_queued=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"{", "not JSON", id="json"),
        pytest.param(b"[]", "tenants file: got ", id="list"),
        pytest.param(document(version=2), "version: got 2, expected 1", id="version"),
        pytest.param(document({"name": "a"}), "tenants[0].keysPath: missing", id="no-keys"),
        pytest.param(
            document({**ACME, "weight": 0}), "tenants[0].weight: got 0, expected", id="weight"
        ),
        pytest.param(
            document({**ACME, "weight": "2"}), "tenants[0].weight: got '2', expected", id="text"
        ),
        pytest.param(document({**ACME, "weight": True}), "tenants[0].weight: got True", id="bool"),
        pytest.param(document({**ACME, "name": "A/B"}), "tenants[0].name: got 'A/B'", id="name"),
        pytest.param(
            document({**ACME, "keys": 1}),
            "tenants[0].keys: got an unknown field",
            id="unknown",
        ),
        pytest.param(
            document({**ACME, "limits": {"tokensPerMinute": -1}}),
            "tenants[0].limits.tokensPerMinute: got -1",
            id="limit",
        ),
        pytest.param(document(ACME, ACME), "tenants: got the name 'acme' twice", id="twice"),
        pytest.param(
            document(*({**ACME, "name": f"t{i}"} for i in range(65))), "tenants: got", id="many"
        ),
    ],
)
def test_an_invalid_file_is_rejected_with_the_field(content: bytes, message: str) -> None:
    with pytest.raises(TenantsConfigError) as refused:
        TenantsConfig.loads(content)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
