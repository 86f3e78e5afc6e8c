"""What gateways change of a model's objects: a token, a policy, tenants, the number of routers."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.kube.context import derive_model_secrets
from faasmoe_operator.kube.manifests import ModelContext, serving_objects
from faasmoe_operator.kube.manifests.context import GatewayPods

GATEWAYS = GatewayPods("faasmoe-system", {"app.kubernetes.io/name": "faasmoe-gateway"})
ACME = TenantSpec.model_validate({"name": "acme", "apiKeysSecretRef": {"name": "k"}, "weight": 3})
SCALING = {"router": {"scaling": {"minReplicas": 0, "maxReplicas": 4}}}


def one(ctx: ModelContext, kind: str) -> Any:
    (obj,) = (obj for obj in serving_objects(ctx) if obj["kind"] == kind)
    return obj


def with_gateways(spec: dict[str, Any] | None = None, **fields: Any) -> ModelContext:
    secrets = derive_model_secrets(b"r" * 32, "u-1", has_gateways=True)
    return make_context(spec, gateways=GATEWAYS, secrets=secrets, **fields)


def test_routers_know_gateways_by_a_token_of_the_model() -> None:
    ctx = with_gateways()
    secret = one(ctx, "Secret")
    token = base64.b64decode(secret["data"]["front-token"]).decode()
    assert token == ctx.secrets.front_token
    (container,) = one(ctx, "Deployment")["spec"]["template"]["spec"]["containers"]
    (variable,) = (v for v in container["env"] if v["name"] == "FAASMOE_FRONT_TOKEN")
    reference = {"name": secret["metadata"]["name"], "key": "front-token"}
    assert variable["valueFrom"] == {"secretKeyRef": reference}
    without = make_context(secrets=derive_model_secrets(b"r" * 32, "u-1"))
    assert "front-token" not in one(without, "Secret")["data"]
    assert "FRONT_TOKEN" not in json.dumps(one(without, "Deployment"))
    assert one(without, "Secret")["metadata"]["name"] != secret["metadata"]["name"]


def test_gateways_reach_routers_whoever_the_clients_are() -> None:
    clients = {"networking": {"clients": [{"podSelector": {"matchLabels": {"role": "chat"}}}]}}

    def peers(ctx: ModelContext) -> list[Any]:
        (policy,) = (
            obj["spec"]
            for obj in serving_objects(ctx)
            if obj["kind"] == "NetworkPolicy" and obj["metadata"]["name"] == "qwen-router"
        )
        return [p for r in policy["ingress"] if r["ports"][0]["port"] == 8000 for p in r["from"]]

    assert len(peers(make_context(clients))) == 1
    _, gateways = peers(with_gateways(clients))
    assert gateways["podSelector"]["matchLabels"] == dict(GATEWAYS.pod_labels)
    names = gateways["namespaceSelector"]["matchLabels"]
    assert names == {"kubernetes.io/metadata.name": "faasmoe-system"}


def test_routers_are_told_of_tenants_whose_keys_gateways_check() -> None:
    ctx = with_gateways(tenants=(ACME,))
    (told,) = json.loads(one(ctx, "ConfigMap")["data"]["tenants.json"])["tenants"]
    assert (told["name"], told["weight"]) == ("acme", 3)
    template = one(ctx, "Deployment")["spec"]["template"]["spec"]
    mounts = [m["mountPath"] for m in template["containers"][0]["volumeMounts"]]
    assert not [path for path in mounts if told["keysPath"].startswith(path)]  # no key for routers
    variables = [v["name"] for v in template["containers"][0]["env"]]
    assert "FAASMOE_TENANTS_FILE" in variables
    services = [o for o in serving_objects(ctx) if o["kind"] == "Service"]
    assert [s["metadata"]["name"] for s in services] == ["qwen"]


@pytest.mark.parametrize(
    ("spec", "scaled", "expected"),
    [
        (SCALING, 0, 0),
        (SCALING, 3, 3),
        (SCALING, None, 1),  # without gateways nobody would start one
        ({"router": {"replicas": 2}}, None, 2),
        ({**SCALING, "suspend": True}, 3, 0),
    ],
)
def test_how_many_routers_run(spec: dict[str, Any], scaled: int | None, expected: int) -> None:
    ctx = make_context(spec, scaled_routers=scaled)
    assert one(ctx, "Deployment")["spec"]["replicas"] == expected
