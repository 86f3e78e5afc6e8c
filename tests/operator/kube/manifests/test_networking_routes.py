from typing import Any

import pytest
from model_contexts import make_context

from faasmoe_operator.kube.manifests import (
    ModelContext,
    missing_apis,
    model_url,
    serving_objects,
    tenant_url,
)
from faasmoe_operator.kube.types import Object

TENANTS = [{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}]
ROUTE = {
    "hostnames": ["llm.example.com"],
    "parentRefs": [{"name": "gate", "namespace": "edge", "sectionName": "https"}],
}


def of_kind(ctx: ModelContext, kind: str) -> list[Object]:
    return [obj for obj in serving_objects(ctx) if obj["kind"] == kind]


def networking(**fields: Any) -> dict[str, Any]:
    return {"networking": fields, "tenants": TENANTS}


def test_the_model_and_each_tenant_have_a_service_on_port_80() -> None:
    services = of_kind(make_context({"tenants": TENANTS}), "Service")
    assert [s["metadata"]["name"] for s in services] == ["qwen", "qwen-tenant-acme"]
    assert services[1]["metadata"]["labels"]["faasmoe.dev/tenant"] == "acme"
    for service in services:
        port = service["spec"]["ports"][0]
        assert (port["port"], port["targetPort"]) == (80, "http")


def test_no_external_access_by_default() -> None:
    kinds = {obj["kind"] for obj in serving_objects(make_context({"tenants": TENANTS}))}
    assert not kinds & {"Ingress", "HTTPRoute", "ServiceMonitor"}


def test_ingress_has_paths_of_the_model_and_each_tenant_only() -> None:
    ctx = make_context(networking(ingress={"host": "llm.example.com", "className": "nginx"}))
    (ingress,) = of_kind(ctx, "Ingress")
    (rule,) = ingress["spec"]["rules"]
    assert rule["host"] == "llm.example.com"
    assert {path["path"]: path["backend"]["service"]["name"] for path in rule["http"]["paths"]} == {
        "/v1": "qwen",
        "/acme/v1": "qwen-tenant-acme",
    }
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert "tls" not in ingress["spec"]


def test_ingress_uses_the_configured_certificate() -> None:
    ingress = {"host": "llm.example.com", "tlsSecretName": "cert", "annotations": {"a": "b"}}
    ctx = make_context(networking(ingress=ingress))
    (made,) = of_kind(ctx, "Ingress")
    assert made["spec"]["tls"] == [{"hosts": ["llm.example.com"], "secretName": "cert"}]
    assert made["metadata"]["annotations"] == {"a": "b"}


def test_the_model_and_each_tenant_have_an_http_route() -> None:
    routes = of_kind(make_context(networking(httpRoute=ROUTE)), "HTTPRoute")
    for route in routes:
        assert route["spec"]["hostnames"] == ["llm.example.com"]
        assert route["spec"]["parentRefs"] == [
            {
                "group": "gateway.networking.k8s.io",
                "kind": "Gateway",
                "name": "gate",
                "namespace": "edge",
                "sectionName": "https",
            }
        ]
    paths = {}
    for route in routes:
        (rule,) = route["spec"]["rules"]
        (match,) = rule["matches"]
        (backend,) = rule["backendRefs"]
        paths[match["path"]["value"]] = (backend["name"], backend["port"])
    assert paths == {"/v1": ("qwen", 80), "/acme/v1": ("qwen-tenant-acme", 80)}


@pytest.mark.parametrize(
    ("spec", "kind", "field", "api"),
    [
        pytest.param(
            {"networking": {"httpRoute": ROUTE}},
            "HTTPRoute",
            "spec.networking.httpRoute",
            "gateway.networking.k8s.io/v1",
            id="gateway",
        ),
        pytest.param(
            {"monitoring": {"serviceMonitor": {}}},
            "ServiceMonitor",
            "spec.monitoring.serviceMonitor",
            "monitoring.coreos.com/v1",
            id="monitoring",
        ),
    ],
)
def test_objects_of_missing_apis_are_left_out_and_reported(
    spec: dict[str, Any], kind: str, field: str, api: str
) -> None:
    ctx = make_context(spec, served_apis=frozenset())
    assert of_kind(ctx, kind) == []
    assert missing_apis(ctx) == {field: api}
    assert len(of_kind(make_context(spec), kind)) == 1
    assert missing_apis(make_context(spec)) == {}


def test_each_router_is_scraped_once_whatever_the_tenants() -> None:
    spec = {"tenants": TENANTS, "monitoring": {"serviceMonitor": {"labels": {"a": "b"}}}}
    ctx = make_context(spec)
    (monitor,) = of_kind(ctx, "ServiceMonitor")
    selector = monitor["spec"]["selector"]
    assert selector["matchExpressions"] == [
        {"key": "faasmoe.dev/tenant", "operator": "DoesNotExist"}
    ]
    scraped = [
        service["metadata"]["name"]
        for service in of_kind(ctx, "Service")
        if service["metadata"]["labels"].items() >= selector["matchLabels"].items()
        and "faasmoe.dev/tenant" not in service["metadata"]["labels"]
    ]
    assert scraped == ["qwen"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint == {"port": "metrics", "path": "/metrics", "interval": "30s"}
    assert monitor["metadata"]["labels"]["a"] == "b"


@pytest.mark.parametrize(
    ("fields", "model", "tenant"),
    [
        pytest.param(
            {},
            "http://qwen.llm.svc/v1",
            "http://qwen-tenant-acme.llm.svc/acme/v1",
            id="within",
        ),
        pytest.param(
            {"ingress": {"host": "llm.example.com"}},
            "http://llm.example.com/v1",
            "http://llm.example.com/acme/v1",
            id="ingress",
        ),
        pytest.param(
            {"ingress": {"host": "llm.example.com", "tlsSecretName": "cert"}},
            "https://llm.example.com/v1",
            "https://llm.example.com/acme/v1",
            id="tls",
        ),
        pytest.param(
            {"httpRoute": ROUTE},
            "https://llm.example.com/v1",
            "https://llm.example.com/acme/v1",
            id="http-route",
        ),
        pytest.param(
            {"httpRoute": {"parentRefs": [{"name": "gate"}]}},
            "http://qwen.llm.svc/v1",
            "http://qwen-tenant-acme.llm.svc/acme/v1",
            id="without-a-host",
        ),
    ],
)
def test_model_and_tenant_urls(fields: dict[str, Any], model: str, tenant: str) -> None:
    ctx = make_context(networking(**fields))
    assert model_url(ctx) == model
    assert tenant_url(ctx, "acme") == tenant
