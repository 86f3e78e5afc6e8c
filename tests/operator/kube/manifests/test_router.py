import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_operator.kube.manifests import ControlSecrets, ModelContext, serving_objects
from faasmoe_operator.kube.types import Object
from faasmoe_router.config import RouterConfig

TENANTS = [{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}]


def one(ctx: ModelContext, kind: str, name: str = "") -> Object:
    found = [obj for obj in serving_objects(ctx) if obj["kind"] == kind]
    return next(obj for obj in found if name in ("", obj["metadata"]["name"]))


def pod(ctx: ModelContext) -> Any:
    return one(ctx, "Deployment")["spec"]["template"]["spec"]


def environment(ctx: ModelContext) -> dict[str, Object]:
    return {variable["name"]: variable for variable in pod(ctx)["containers"][0]["env"]}


def values(ctx: ModelContext) -> dict[str, str]:
    """Return the environment as the container sees it."""
    secret = one(ctx, "Secret")
    token = base64.b64decode(secret["data"]["token"]).decode()
    return {
        name: variable.get("value", token if name == "FAASMOE_TOKEN" else "")
        for name, variable in environment(ctx).items()
    }


def test_router_accepts_its_environment() -> None:
    router = {
        "device": "cpu",
        "dtype": "float32",
        "compute": "modules",
        "maxModelLen": 4096,
        "maxNumSeqs": 16,
        "maxNumBatchedTokens": 256,
        "maxWaiting": 64,
        "kvCacheMemory": "6Gi",
        "servedModelName": "org/qwen",
        "generationConfig": "none",
        "corsOrigins": ["https://chat.example.com", "*"],
    }
    config = RouterConfig.from_env(values(make_context({"router": router})))
    assert str(config.store) == "/store/qwen"
    assert config.control_url == "http://faasmoe-control.faasmoe.svc:8090/models/llm/qwen"
    assert (config.host, config.port, config.device) == ("0.0.0.0", 8000, "cpu")
    assert (config.dtype, config.compute) == ("float32", "modules")
    assert (config.max_model_len, config.max_num_seqs) == (4096, 16)
    assert (config.max_num_batched_tokens, config.max_waiting) == (256, 64)
    assert config.kv_cache_bytes == 6 << 30
    assert config.model_name == "org/qwen"
    assert config.generation_config == "none"
    assert config.cors_origins == ("https://chat.example.com", "*")
    assert config.token == "token-of-the-model"


def test_unset_fields_are_left_to_the_router() -> None:
    variables = values(make_context())
    assert not {"FAASMOE_MAX_MODEL_LEN", "FAASMOE_KV_CACHE_BYTES"} & variables.keys()
    assert "FAASMOE_TENANTS_FILE" not in variables


def test_additional_environment_overrides_defaults_but_not_settings() -> None:
    template = {"env": [{"name": "MORE", "value": "1"}]}
    router = {"env": [{"name": "OMP_WAIT_POLICY", "value": "ACTIVE"}], "template": template}
    variables = values(make_context({"router": router}))
    assert variables["OMP_WAIT_POLICY"] == "ACTIVE"
    assert variables["MORE"] == "1"
    assert values(make_context())["OMP_WAIT_POLICY"] == "PASSIVE"


def test_thread_count_follows_the_cpu_limit() -> None:
    variable = environment(make_context())["OMP_NUM_THREADS"]
    assert variable["valueFrom"]["resourceFieldRef"] == {
        "containerName": "router",
        "resource": "limits.cpu",
        "divisor": "1",
    }


def test_rollout_starts_new_routers_first() -> None:
    spec = one(make_context(), "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    container = pod(make_context())["containers"][0]
    assert container["lifecycle"]["preStop"] == {"sleep": {"seconds": 5}}
    assert pod(make_context())["terminationGracePeriodSeconds"] == 60


def test_router_has_startup_liveness_and_readiness_probes() -> None:
    container = pod(make_context())["containers"][0]
    paths = {
        name: container[name]["httpGet"]["path"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths == {
        "startupProbe": "/ping",
        "livenessProbe": "/ping",
        "readinessProbe": "/health",
    }
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 1800


@pytest.mark.parametrize(("spec", "replicas"), [({}, 1), ({"router": {"replicas": 3}}, 3)])
def test_deployment_has_the_replicas_of_the_spec(spec: dict[str, Any], replicas: int) -> None:
    assert one(make_context(spec), "Deployment")["spec"]["replicas"] == replicas


def test_deployment_has_no_replicas_while_suspended() -> None:
    ctx = make_context({"router": {"replicas": 3}, "suspend": True})
    assert one(ctx, "Deployment")["spec"]["replicas"] == 0


def test_router_mounts_the_store_read_only() -> None:
    mounts = {m["mountPath"]: m for m in pod(make_context())["containers"][0]["volumeMounts"]}
    assert mounts["/store"]["readOnly"] is True


def test_tenants_file_and_keys_are_mounted_where_the_file_refers_to() -> None:
    ctx = make_context({"tenants": TENANTS})
    path = values(ctx)["FAASMOE_TENANTS_FILE"]
    mounts = {m["mountPath"]: m for m in pod(ctx)["containers"][0]["volumeMounts"]}
    volumes = {v["name"]: v for v in pod(ctx)["volumes"]}
    folder, _, name = path.rpartition("/")
    assert volumes[mounts[folder]["name"]]["configMap"]["name"] == "qwen-tenants"
    document = json.loads(one(ctx, "ConfigMap")["data"][name])
    keys = volumes[mounts[document["tenants"][0]["keysPath"]]["name"]]
    assert keys["secret"]["secretName"] == "acme-keys"
    assert keys["secret"]["optional"] is True


def test_changed_limits_do_not_replace_routers() -> None:
    limited = [{**TENANTS[0], "limits": {"requestsPerMinute": 1}, "weight": 9}]
    before, after = make_context({"tenants": TENANTS}), make_context({"tenants": limited})
    assert one(before, "Deployment") == one(after, "Deployment")
    assert one(before, "ConfigMap") != one(after, "ConfigMap")


def test_another_token_is_another_secret_and_replaces_routers() -> None:
    ctx = make_context()
    other = replace(ctx, secrets=ControlSecrets("another-token", "00" * 32))
    names = {one(c, "Secret")["metadata"]["name"] for c in (ctx, other)}
    assert len(names) == 2
    assert one(ctx, "Deployment") != one(other, "Deployment")
    assert one(ctx, "Secret")["immutable"] is True


def test_no_object_contains_the_function_key() -> None:
    key = "feedfacefeedfacefeedfacefeedface"
    ctx = make_context(secrets=ControlSecrets("token", key))
    encoded = base64.b64encode(key.encode()).decode()
    text = json.dumps(serving_objects(ctx))
    assert key not in text
    assert encoded not in text


def test_disruption_budget_evicts_one_router_at_a_time() -> None:
    budget = one(make_context(), "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
