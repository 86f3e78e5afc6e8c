import json
from typing import Any

from model_contexts import make_context

from faasmoe_operator.kube.manifests import ModelContext, serving_objects

ACME = {
    "name": "acme",
    "apiKeysSecretRef": {"name": "acme-keys"},
    "weight": 2,
    "priority": -1,
    "limits": {"requestsPerMinute": 600, "tokensPerMinute": 200_000},
    "modelAlias": "acme-chat",
    "systemPrompt": "Du heißt Acme.",
    "sharePrefixCacheWith": ["umbrella"],
}
UMBRELLA = {"name": "umbrella", "apiKeysSecretRef": {"name": "umbrella-keys"}}


def document(ctx: ModelContext) -> Any:
    (found,) = (obj for obj in serving_objects(ctx) if obj["kind"] == "ConfigMap")
    return json.loads(found["data"]["tenants.json"])


def test_tenants_file_has_all_fields_of_a_tenant() -> None:
    routers = {"replicas": 3}
    assert document(make_context({"tenants": [ACME, UMBRELLA], "router": routers})) == {
        "version": 1,
        "routerReplicas": 3,
        "model": "qwen",
        "tenants": [
            {
                "name": "acme",
                "keysPath": "/etc/faasmoe/keys/acme",
                "weight": 2,
                "priority": -1,
                "modelAlias": "acme-chat",
                "systemPrompt": "Du heißt Acme.",
                "sharePrefixCacheWith": ["umbrella"],
                "limits": {"requestsPerMinute": 600, "tokensPerMinute": 200_000},
            },
            {
                "name": "umbrella",
                "keysPath": "/etc/faasmoe/keys/umbrella",
                "weight": 1,
                "priority": 0,
                "modelAlias": None,
                "systemPrompt": None,
                "sharePrefixCacheWith": [],
                "limits": {},
            },
        ],
    }


def test_no_tenants_file_without_tenants() -> None:
    assert "ConfigMap" not in [obj["kind"] for obj in serving_objects(make_context())]


def test_prompts_are_written_as_utf8_without_escapes() -> None:
    prompt = "ü" * 8192
    ctx = make_context({"tenants": [{**UMBRELLA, "systemPrompt": prompt}]})
    (found,) = (obj for obj in serving_objects(ctx) if obj["kind"] == "ConfigMap")
    assert prompt in found["data"]["tenants.json"]
