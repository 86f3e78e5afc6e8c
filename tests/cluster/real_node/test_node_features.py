"""What needs a kubelet: names of Services, requests that it applies, gateways in pods."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from apiserver import ApiServer, Object, eventually
from moemodels import make_secret, make_tenant, router_pods, sandbox_pods, wait_for_condition
from pod_chat import pod_chat
from pod_runner import PodRunner
from release import Release

from faasmoe_operator.api.v1alpha1.field_types import parse_quantity

pytestmark = pytest.mark.timeout(900)  # images start slowly on few cores

READY_S = 300.0
KEY = "sk-tests-acme"


def applied_memory(api: ApiServer, namespace: str, name: str) -> dict[str, int]:
    """Return the memory that the kubelet has applied as a request, by the sandbox's uid."""
    applied: dict[str, int] = {}
    for pod in sandbox_pods(api, namespace, name):
        for container in pod["status"].get("containerStatuses", ()):
            assert container["restartCount"] == 0
            if memory := container.get("resources", {}).get("requests", {}).get("memory"):
                applied[pod["metadata"]["uid"]] = int(parse_quantity(memory))
    return applied


def test_caches_are_filled_through_the_store_servers_service(
    api: ApiServer, release: Release, programs: PodRunner, tiny_model: Callable[..., Object]
) -> None:
    namespace, plain, cached = programs.namespace, tiny_model("plain"), tiny_model("tiny")
    cached["spec"]["store"]["cache"] = {"resources": {"requests": {"cpu": "50m"}}}
    texts = []
    for model in (cached, plain):
        name = model["metadata"]["name"]
        api.create("moemodels", model)
        wait_for_condition(api, namespace, name, "Ready", timeout_s=READY_S)
        texts.append(pod_chat(programs, f"http://{name}.{namespace}.svc/v1", model=name))
        if name == "tiny":
            for pod in sandbox_pods(api, namespace, name):
                assert not any("persistentVolumeClaim" in v for v in pod["spec"]["volumes"])
    assert texts[0] == texts[1]


def test_the_kubelet_resizes_sandboxes_without_a_restart(
    api: ApiServer, release: Release, programs: PodRunner, tiny_model: Callable[..., Object]
) -> None:
    if "pods/resize" not in api.core_resources():
        pytest.skip("the API server has no pods/resize")
    namespace = programs.namespace
    experts = {"warmPool": 2, "functionsPerSandbox": 1, "scaling": {"windowSeconds": 600}}
    api.create("moemodels", tiny_model("tiny", experts=experts))
    wait_for_condition(api, namespace, "tiny", "Ready", timeout_s=READY_S)
    generic = eventually(
        lambda: applied_memory(api, namespace, "tiny"),
        lambda found: len(found) == 2,
        timeout_s=READY_S,
    )
    (idle_bytes,) = set(generic.values())
    pod_chat(programs, f"http://tiny.{namespace}.svc/v1")
    eventually(
        lambda: applied_memory(api, namespace, "tiny"),
        lambda found: any(found.get(uid, 0) > idle_bytes for uid in generic),
        timeout_s=READY_S,
    )
    scaling = {"windowSeconds": 10, "scaleToZeroGracePeriodSeconds": 0}
    api.patch("moemodels", namespace, "tiny", {"spec": {"experts": {"scaling": scaling}}})
    eventually(
        lambda: applied_memory(api, namespace, "tiny"),
        lambda found: set(found.values()) == {idle_bytes},
        timeout_s=READY_S,
    )


def test_a_request_to_the_gateways_service_wakes_a_router(
    api: ApiServer, release: Release, programs: PodRunner, tiny_model: Callable[..., Object]
) -> None:
    namespace = programs.namespace
    release.upgrade({"gateway": {"enabled": True, "replicas": 2}})
    api.create("secrets", make_secret("acme-keys", namespace, {"first": KEY}))
    model = tiny_model("tiny")
    model["spec"]["router"]["scaling"] = {"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 20}
    api.create("moemodels", model)
    api.create("tenants", make_tenant("acme", namespace, models=[{"name": "tiny", "alias": "a"}]))
    wait_for_condition(api, namespace, "acme", "Ready", plural="tenants", timeout_s=READY_S)
    wait_for_condition(
        api, namespace, "tiny", "RouterReady", reason="ScaledToZero", timeout_s=READY_S
    )
    text = pod_chat(programs, release.gateway_url(), key=KEY, model="a")
    assert len(router_pods(api, namespace, "tiny")) == 1
    eventually(
        lambda: router_pods(api, namespace, "tiny"), lambda pods: pods == [], timeout_s=READY_S
    )
    assert pod_chat(programs, release.gateway_url(), key=KEY, model="a") == text
    api.delete("tenants", namespace, "acme")
    eventually(lambda: api.find("tenants", namespace, "acme"), lambda found: found is None)
