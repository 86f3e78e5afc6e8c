"""With `store.cache`, sandboxes need no claim, and a server beside the claim serves them."""

from typing import Any
from urllib.parse import urlsplit

from model_contexts import make_context

from faasmoe_expert.blocks.__main__ import BlockServerConfig
from faasmoe_expert.config import SandboxConfig
from faasmoe_operator.kube.manifests import ModelContext, sandbox_pod, serving_objects
from faasmoe_operator.kube.types import Object

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
FUNCTION_BYTES = 20 * 16 << 20  # a third of 60 experts
NAME = "qwen-sandbox-abcde"


def objects(ctx: ModelContext, kind: str) -> dict[str, Object]:
    return {o["metadata"]["name"]: o for o in serving_objects(ctx) if o["kind"] == kind}


def context(**cache: Any) -> ModelContext:
    return make_context({"store": {"cache": cache}})


def settings(container: Any) -> dict[str, str]:
    return {e["name"]: e["value"] for e in container["env"] if "value" in e}


def server_pod(ctx: ModelContext) -> Any:
    return objects(ctx, "Deployment")["qwen-store-server"]["spec"]["template"]["spec"]


def test_there_is_no_server_without_caches() -> None:
    ctx = make_context()
    assert list(objects(ctx, "Deployment")) == ["qwen-router"]
    assert "qwen-store-server" not in objects(ctx, "Service")
    assert "qwen-store-server" not in objects(ctx, "ServiceAccount")
    assert "qwen-store-server" not in objects(ctx, "NetworkPolicy")


def test_a_sandbox_with_a_cache_mounts_no_claim() -> None:
    volumes = sandbox_pod(context(), name=NAME)["spec"]["volumes"]
    assert [volume["name"] for volume in volumes] == ["cache", "tmp"]
    assert not any("persistentVolumeClaim" in volume for volume in volumes)


def test_a_cache_has_room_for_twice_the_functions_unless_it_is_set() -> None:
    for cache, expected in (({}, 2 * FUNCTION_BYTES), ({"sizeLimit": "4Gi"}, 4 << 30)):
        pod = sandbox_pod(context(**cache), name=NAME)["spec"]
        config = SandboxConfig.from_env(settings(pod["containers"][0]))
        assert config.cache_bytes == expected
        limit = pod["volumes"][0]["emptyDir"]["sizeLimit"]
        assert int(limit.removesuffix("Mi")) << 20 > expected


def test_a_sandbox_reaches_the_server_that_is_there() -> None:
    ctx = context()
    pod = sandbox_pod(ctx, name=NAME)["spec"]
    config = SandboxConfig.from_env(settings(pod["containers"][0]))
    (url,) = map(urlsplit, config.store_peers)
    service = objects(ctx, "Service")["qwen-store-server"]
    assert url.hostname == f"{service['metadata']['name']}.llm.svc"
    assert [port["port"] for port in service["spec"]["ports"]] == [url.port]
    mounts = pod["containers"][0]["volumeMounts"]
    (cache,) = (m["mountPath"] for m in mounts if m["name"] == "cache")
    assert str(config.cache_dir).startswith(f"{cache}/")
    labels = objects(ctx, "Deployment")["qwen-store-server"]["spec"]["template"]["metadata"][
        "labels"
    ]
    assert labels.items() >= service["spec"]["selector"].items()


def test_the_server_accepts_its_environment() -> None:
    (container,) = server_pod(context(maxBytesPerSecond="1G", maxConnections=8))["containers"]
    config = BlockServerConfig.from_env(settings(container))
    assert (str(config.store), config.host, config.port) == ("/store/qwen", "0.0.0.0", 9092)
    assert (config.bytes_per_s, config.max_connections) == (10**9, 8)
    assert "FAASMOE_TOKEN" in {e["name"] for e in container["env"]}
    assert container["command"] == ["python", "-m", "faasmoe_expert.blocks"]


def test_sandboxes_run_anywhere_and_the_rest_beside_the_claim() -> None:
    ctx = context()
    assert "affinity" not in sandbox_pod(ctx, name=NAME)["spec"]
    (term,) = server_pod(ctx)["affinity"]["podAffinity"][REQUIRED]
    (other,) = term["labelSelector"]["matchExpressions"]
    assert (other["operator"], other["values"]) == ("NotIn", ["sandbox"])


def test_a_suspended_model_has_no_server() -> None:
    ctx = make_context({"store": {"cache": {}}, "suspend": True})
    assert objects(ctx, "Deployment")["qwen-store-server"]["spec"]["replicas"] == 0


def test_a_server_whose_connections_are_all_in_use_is_not_restarted() -> None:
    (container,) = server_pod(context())["containers"]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[name]["tcpSocket"] == {"port": "http"}
        assert "httpGet" not in container[name]
