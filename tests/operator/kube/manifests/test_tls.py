"""With TLS, pods mount a certificate, and everything that calls them knows it."""

from collections.abc import Callable
from typing import Any

import pytest
from kubernetes_schemas import check_schema
from model_contexts import all_objects, make_context

from faasmoe_expert.blocks.__main__ import BlockServerConfig
from faasmoe_expert.config import SandboxConfig
from faasmoe_operator.kube.manifests import ControlEndpoint, ModelContext
from faasmoe_operator.kube.manifests.networking import model_url, tenant_url
from faasmoe_operator.kube.manifests.sandbox import sandbox_template_hash
from faasmoe_operator.kube.types import Object
from faasmoe_router.config import RouterConfig

SECRET = "faasmoe-models-tls"
CONTROL = ControlEndpoint("https://operator.faasmoe.svc:8090", "faasmoe", {"app": "o"}, 8090)
SPEC = {
    "store": {"cache": {}},
    "tenants": [{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}],
}


def context(secret: str | None = SECRET) -> ModelContext:
    return make_context(SPEC, tls_secret=secret, control=CONTROL)


def pods(ctx: ModelContext) -> dict[str, Any]:
    """Return the specs of router, store server and sandbox by their container's name."""
    found = {}
    for obj in all_objects(ctx):
        spec = obj["spec"] if obj["kind"] == "Pod" else None
        if obj["kind"] == "Deployment":
            spec = obj["spec"]["template"]["spec"]
        if spec is not None:
            found[spec["containers"][0]["name"]] = spec
    return found


def settings(spec: Any) -> dict[str, str]:
    return {v["name"]: v["value"] for v in spec["containers"][0]["env"] if "value" in v}


@pytest.mark.parametrize("name", ["router", "sandbox", "store-server"])
def test_every_pod_mounts_the_certificate_where_it_looks_for_it(name: str) -> None:
    spec = pods(context())[name]
    [volume] = [v for v in spec["volumes"] if v["name"] == "tls"]
    assert volume["secret"] == {"secretName": SECRET, "defaultMode": 0o440}
    [mount] = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "tls"]
    assert mount["readOnly"]
    parse: dict[str, Callable[[dict[str, str]], Any]] = {
        "router": RouterConfig.from_env,
        "sandbox": SandboxConfig.from_env,
        "store-server": BlockServerConfig.from_env,
    }
    config = parse[name](settings(spec))
    assert str(config.tls_folder) == mount["mountPath"]
    assert config.tls_namespace == "llm"


def test_routers_and_sandboxes_call_over_tls() -> None:
    found = pods(context())
    router = RouterConfig.from_env(settings(found["router"]))
    assert router.control_url == "https://operator.faasmoe.svc:8090/models/llm/qwen"
    sandbox = SandboxConfig.from_env(settings(found["sandbox"]))
    assert sandbox.store_peers == ("https://qwen-store-server.llm.svc:9092",)


@pytest.mark.parametrize("name", ["router", "sandbox"])
@pytest.mark.parametrize(("secret", "scheme"), [(SECRET, "HTTPS"), (None, "HTTP")])
def test_probes_speak_what_the_port_does(name: str, secret: str | None, scheme: str) -> None:
    [container] = pods(context(secret))[name]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["scheme"] == scheme


def services(ctx: ModelContext) -> list[Object]:
    return [
        o
        for o in all_objects(ctx)
        if o["kind"] == "Service" and "store" not in o["metadata"]["name"]
    ]


def test_services_tell_what_their_routers_speak() -> None:
    for service in services(context()):
        assert service["spec"]["ports"][0]["appProtocol"] == "https"
        assert all("appProtocol" not in port for port in service["spec"]["ports"][1:])
    assert model_url(context()) == "https://qwen.llm.svc/v1"
    assert tenant_url(context(), "acme") == "https://qwen-tenant-acme.llm.svc/acme/v1"


def test_every_object_is_valid() -> None:
    for obj in all_objects(context()):
        check_schema(obj)


def test_without_it_nothing_is_different() -> None:
    for spec in pods(context(None)).values():
        assert not any(volume["name"] == "tls" for volume in spec["volumes"])
        assert not any(name.startswith("FAASMOE_TLS") for name in settings(spec))
    assert not any("appProtocol" in p for s in services(context(None)) for p in s["spec"]["ports"])


def test_switching_it_on_replaces_sandboxes_and_a_renewal_does_not() -> None:
    assert sandbox_template_hash(context()) != sandbox_template_hash(context(None))
    assert SECRET in str(pods(context())["sandbox"])  # by name, whatever its content
