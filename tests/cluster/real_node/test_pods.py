"""What the fake node cannot show: images, kubelet, Services, volumes, and an install with helm."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from apiserver import ApiServer, Object, eventually
from moemodels import (
    function_by_pod,
    make_secret,
    make_tenant,
    model_objects,
    router_pods,
    sandbox_pods,
    wait_for_condition,
)
from pod_chat import CHAT, PROMPT, pod_chat
from pod_runner import PodRunner
from release import Release, make_known

pytestmark = pytest.mark.timeout(900)  # images start slowly on few cores

KEY = "sk-tests-acme"
READY_S = 300.0


def test_operator_becomes_ready_and_the_chart_test_passes(release: Release) -> None:
    assert "Succeeded" in release.run("test")


def test_a_model_chats_by_its_tenant_service_scales_suspends_and_is_deleted(
    api: ApiServer, programs: PodRunner, tiny_model: Callable[..., Object]
) -> None:
    namespace = programs.namespace
    api.create("secrets", make_secret("acme-keys", namespace, {"first": KEY}))
    tenants = [{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}]
    api.create("moemodels", tiny_model("tiny", tenants=tenants))
    wait_for_condition(api, namespace, "tiny", "Ready", timeout_s=READY_S)
    status = api.get("moemodels", namespace, "tiny")["status"]
    assert status["functions"] == {"total": 2, "active": 0, "replicas": 0}
    assert sandbox_pods(api, namespace, "tiny") == []

    url = f"http://tiny-tenant-acme.{namespace}.svc/acme/v1"
    rejected = json.loads(programs.run("stranger", CHAT, url, "tiny", "sk-unknown", PROMPT))
    assert rejected["texts"] == {}
    assert "401" in rejected["errors"][0]
    assert sandbox_pods(api, namespace, "tiny") == []

    text = pod_chat(programs, url, key=KEY)
    held = eventually(
        lambda: function_by_pod(api, namespace, "tiny"), lambda found: all(found.values())
    )
    assert len(held) == len(set(held.values())) == 2
    wait_for_condition(api, namespace, "tiny", "Active")
    eventually(lambda: sandbox_pods(api, namespace, "tiny"), lambda pods: pods == [], timeout_s=180)
    wait_for_condition(api, namespace, "tiny", "Active", status="False")
    assert pod_chat(programs, url, key=KEY) == text

    api.patch("moemodels", namespace, "tiny", {"spec": {"suspend": True}})
    wait_for_condition(api, namespace, "tiny", "Ready", status="False", reason="Suspended")
    of_the_model = "faasmoe.dev/model=tiny,app.kubernetes.io/component in (router,sandbox)"
    eventually(
        lambda: api.list("pods", namespace, labels=of_the_model),
        lambda pods: pods == [],
        timeout_s=180,
    )
    api.patch("moemodels", namespace, "tiny", {"spec": {"suspend": False}})
    wait_for_condition(api, namespace, "tiny", "Ready", timeout_s=READY_S)
    assert pod_chat(programs, url, key=KEY) == text

    api.delete("moemodels", namespace, "tiny")
    eventually(
        lambda: model_objects(api, namespace, "tiny"), lambda found: found == {}, timeout_s=180
    )
    assert api.find("secrets", namespace, "acme-keys") is not None


def test_no_request_fails_while_operator_and_pods_are_replaced(
    api: ApiServer, release: Release, programs: PodRunner, tiny_model: Callable[..., Object]
) -> None:
    namespace = programs.namespace
    api.create("moemodels", tiny_model("tiny", experts={"scaling": {"windowSeconds": 600}}))
    wait_for_condition(api, namespace, "tiny", "Ready", timeout_s=READY_S)
    url = f"http://tiny.{namespace}.svc/v1"
    text = pod_chat(programs, url)
    held = eventually(
        lambda: function_by_pod(api, namespace, "tiny"),
        lambda found: found and all(found.values()),
    )
    programs.start("traffic", CHAT, url, "tiny", "none", PROMPT, "stop")

    release.replace_operator()
    wait_for_condition(api, namespace, "tiny", "Active")
    assert function_by_pod(api, namespace, "tiny") == held

    blue = {"template": {"labels": {"team": "blue"}}}
    api.patch("moemodels", namespace, "tiny", {"spec": {"router": blue, "experts": blue}})
    eventually(
        lambda: router_pods(api, namespace, "tiny"),
        lambda pods: len(pods) == 1 and pods[0]["metadata"]["labels"].get("team") == "blue",
        timeout_s=READY_S,
    )
    eventually(
        lambda: set(function_by_pod(api, namespace, "tiny")),
        lambda uids: uids and not uids & set(held),
        timeout_s=READY_S,
    )
    make_known(api, namespace, "stop")
    result = json.loads(programs.wait_for_termination_message("traffic"))
    assert result["errors"] == []
    assert set(result["texts"]) == {text}
    assert result["texts"][text] > 5


def test_no_request_fails_while_helm_upgrades_everything(
    api: ApiServer, release: Release, programs: PodRunner, tiny_model: Callable[..., Object]
) -> None:
    """Operator, gateways, routers and sandboxes are replaced by one, under load from warm."""
    namespace = programs.namespace
    release.upgrade({"gateway": {"enabled": True, "replicas": 2}})
    api.create("secrets", make_secret("acme-keys", namespace, {"first": KEY}))
    api.create("moemodels", tiny_model("tiny", experts={"scaling": {"windowSeconds": 600}}))
    api.create("tenants", make_tenant("acme", namespace, models=[{"name": "tiny"}]))
    wait_for_condition(api, namespace, "acme", "Ready", plural="tenants", timeout_s=READY_S)
    wait_for_condition(api, namespace, "tiny", "Ready", timeout_s=READY_S)
    url = release.gateway_url()
    text = pod_chat(programs, url, key=KEY)
    held = eventually(
        lambda: function_by_pod(api, namespace, "tiny"),
        lambda found: found and all(found.values()),
    )
    (old_router,) = router_pods(api, namespace, "tiny")
    (old_operator,) = release.operators()
    old_gateways = {pod["metadata"]["uid"] for pod in release.gateways()}
    programs.start("traffic", CHAT, url, "tiny", KEY, PROMPT, "stop")

    # Another pull policy is another template of each pod, as another image would be.
    annotations = {"podAnnotations": {"upgraded": "yes"}}
    changed = {"models": {"imagePullPolicy": "Never"}, "gateway": annotations, **annotations}
    release.upgrade(changed)
    assert old_gateways
    eventually(
        release.gateways,
        lambda pods: len(pods) == 2 and not {p["metadata"]["uid"] for p in pods} & old_gateways,
        timeout_s=READY_S,
    )
    assert release.operators()[0]["metadata"]["uid"] != old_operator["metadata"]["uid"]
    eventually(
        lambda: router_pods(api, namespace, "tiny"),
        lambda pods: len(pods) == 1 and pods[0]["metadata"]["uid"] != old_router["metadata"]["uid"],
        timeout_s=READY_S,
    )
    eventually(
        lambda: set(function_by_pod(api, namespace, "tiny")),
        lambda uids: uids and not uids & set(held),
        timeout_s=READY_S,
    )
    make_known(api, namespace, "stop")
    result = json.loads(programs.wait_for_termination_message("traffic"))
    assert result["errors"] == []
    assert set(result["texts"]) == {text}
    assert result["texts"][text] > 5
    print(f"helm upgrade under load: {result['texts'][text]} requests, 0 failed")
    api.delete("tenants", namespace, "acme")
    eventually(lambda: api.find("tenants", namespace, "acme"), lambda found: found is None)
