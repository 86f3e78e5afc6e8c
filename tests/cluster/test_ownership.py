"""Ownership: edits of owned objects are reverted, other objects are left unchanged."""

from __future__ import annotations

from collections.abc import Callable

from apiserver import ApiServer, Object, eventually
from fake_node import FakeNode
from moemodels import model_objects, wait_for_condition
from operator_process import OperatorProcess


def test_restores_changed_and_deleted_objects(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("moemodels", tiny_model("tiny"))
    wait_for_condition(api, namespace, "tiny", "Ready")
    found = model_objects(api, namespace, "tiny")
    (deployment,) = found["deployments"]

    expected_ports = api.get("services", namespace, "tiny")["spec"]["ports"]
    ports = [{"name": "http", "port": 1234, "protocol": "TCP", "targetPort": 8000}]
    api.patch("services", namespace, "tiny", {"spec": {"ports": ports}})
    api.patch("deployments", namespace, deployment, {"spec": {"replicas": 3}})
    for policy in found["networkpolicies"]:
        api.delete("networkpolicies", namespace, policy)

    eventually(
        lambda: api.get("services", namespace, "tiny")["spec"]["ports"],
        lambda restored: restored == expected_ports,
    )
    eventually(
        lambda: api.get("deployments", namespace, deployment)["spec"]["replicas"],
        lambda replicas: replicas == 1,
    )
    eventually(lambda: model_objects(api, namespace, "tiny"), lambda now: now == found)


def test_reports_and_keeps_a_service_it_does_not_own(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    theirs = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "tiny", "namespace": namespace},
        "spec": {"selector": {"app": "theirs"}, "ports": [{"port": 443}]},
    }
    before = api.create("services", theirs)
    api.create("moemodels", tiny_model("tiny"))
    found = wait_for_condition(api, namespace, "tiny", "Ready", status="False", reason="NotOwned")
    assert "tiny" in found["message"]
    assert api.get("services", namespace, "tiny") == before

    api.delete("services", namespace, "tiny")
    wait_for_condition(api, namespace, "tiny", "Ready")


def test_scale_subresource_scales_routers(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("moemodels", tiny_model("tiny"))
    wait_for_condition(api, namespace, "tiny", "Ready")
    api.patch("moemodels", namespace, "tiny", {"spec": {"replicas": 2}}, subresource="scale")
    eventually(
        lambda: api.get("moemodels", namespace, "tiny")["status"]["router"],
        lambda router: router["readyReplicas"] == 2,
        timeout_s=120,
    )


def test_two_models_of_one_namespace_are_independent(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    for name in ("one", "two"):
        api.create("moemodels", tiny_model(name, experts={"warmPool": 1}))
    for name in ("one", "two"):
        wait_for_condition(api, namespace, name, "Ready")
    kept = model_objects(api, namespace, "two")
    api.delete("moemodels", namespace, "one")
    eventually(lambda: model_objects(api, namespace, "one"), lambda found: found == {})
    assert model_objects(api, namespace, "two") == kept
    wait_for_condition(api, namespace, "two", "Ready")
