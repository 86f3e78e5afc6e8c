"""Metrics on a port of their own, and the time that a router has to end."""

from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_expert.config import SandboxConfig
from faasmoe_operator.errors import MoEModelError
from faasmoe_operator.kube.manifests import ModelContext, sandbox_pod, serving_objects
from faasmoe_operator.kube.manifests.context import MONITORING_API
from faasmoe_operator.kube.types import Object
from faasmoe_router.config import RouterConfig

PROMETHEUS = {"podSelector": {"matchLabels": {"app": "prometheus"}}}
WEB = {"podSelector": {"matchLabels": {"app": "web"}}}
TENANTS = [{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}]


def context(**spec: Any) -> ModelContext:
    return make_context({"router": {"metricsPort": 9100}, "tenants": TENANTS, **spec})


def kinds(ctx: ModelContext, kind: str) -> dict[str, Object]:
    objects = [obj for obj in serving_objects(ctx) if obj["kind"] == kind]
    return {obj["metadata"]["name"]: obj for obj in objects}


def pod(ctx: ModelContext) -> Any:
    [deployment] = kinds(ctx, "Deployment").values()
    return deployment["spec"]["template"]["spec"]


def sources_by_port(ctx: ModelContext, policy: str) -> dict[int, Any]:
    rules = kinds(ctx, "NetworkPolicy")[policy]["spec"]["ingress"]
    return {rule["ports"][0]["port"]: rule["from"] for rule in rules}


def settings(ctx: ModelContext) -> dict[str, str]:
    environment = pod(ctx)["containers"][0]["env"]
    return {variable["name"]: variable.get("value", "") for variable in environment}


def test_router_serves_metrics_on_the_port_of_the_spec() -> None:
    ctx = context()
    assert RouterConfig.from_env(settings(ctx)).metrics_port == 9100
    ports = {port["name"]: port["containerPort"] for port in pod(ctx)["containers"][0]["ports"]}
    assert ports == {"http": 8000, "metrics": 9100}


def test_only_the_models_own_service_has_the_port() -> None:
    services = kinds(context(), "Service")
    names = {
        name: [port["name"] for port in service["spec"]["ports"]]
        for name, service in services.items()
    }
    assert sorted(names.values()) == [["http"], ["http", "metrics"]]
    assert "metrics" in names["qwen"]


MONITORING = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


@pytest.mark.parametrize(
    ("monitoring", "peer"),
    [({}, MONITORING), ({"clients": [PROMETHEUS]}, PROMETHEUS)],
)
def test_scrapers_reach_the_ports_of_metrics_alone(monitoring: dict[str, Any], peer: Any) -> None:
    ctx = context(monitoring=monitoring, networking={"clients": [WEB]})
    assert sources_by_port(ctx, "qwen-router") == {8000: [WEB], 9100: [peer]}
    sandbox = sources_by_port(ctx, "qwen-sandbox")
    assert sandbox[9091] == [peer]
    assert peer not in sandbox[9090]


def test_without_scrapers_nobody_reaches_metrics() -> None:
    ctx = context(monitoring={"clients": []})
    assert set(sources_by_port(ctx, "qwen-router")) == {8000}
    assert set(sources_by_port(ctx, "qwen-sandbox")) == {9090}


def test_without_the_field_metrics_have_a_port_of_their_own() -> None:
    ctx = make_context({})
    assert RouterConfig.from_env(settings(ctx)).metrics_port == 8001
    ports = {port["name"]: port["containerPort"] for port in pod(ctx)["containers"][0]["ports"]}
    assert ports == {"http": 8000, "metrics": 8001}
    assert sources_by_port(ctx, "qwen-router")[8001] == [MONITORING]


def test_sandboxes_serve_metrics_on_a_port_of_their_own() -> None:
    [container] = sandbox_pod(make_context({}), name="qwen-sandbox-0")["spec"]["containers"]
    environment = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    assert SandboxConfig.from_env(environment).metrics_port == 9091
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 9090, "metrics": 9091}


def test_pod_monitor_selects_routers_and_sandboxes() -> None:
    spec = {"monitoring": {"podMonitor": {"labels": {"release": "prometheus"}}}}
    ctx = make_context(spec, served_apis=frozenset({MONITORING_API}))
    [monitor] = kinds(ctx, "PodMonitor").values()
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    selector = monitor["spec"]["selector"]
    assert selector["matchLabels"] == {"faasmoe.dev/model": "qwen"}
    assert selector["matchExpressions"][0]["values"] == ["router", "sandbox"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    assert kinds(make_context(spec, served_apis=frozenset()), "PodMonitor") == {}


def test_port_of_the_api_is_refused() -> None:
    with pytest.raises(MoEModelError, match="metricsPort: got 8000"):
        make_context({"router": {"metricsPort": 8000}})


@pytest.mark.parametrize("grace_s", [30, 60, 900])
def test_drain_follows_the_grace_of_the_pod(grace_s: int) -> None:
    ctx = make_context({"router": {"terminationGracePeriodSeconds": grace_s}})
    assert pod(ctx)["terminationGracePeriodSeconds"] == grace_s
    assert RouterConfig.from_env(settings(ctx)).drain_timeout_s == grace_s - 20
