"""Whose objects are whose: edits of ours are put back, what is not ours is left alone."""

from __future__ import annotations

from collections.abc import Callable

from apiserver import ApiServer, Object, eventually
from moemodels import objects_of, wait_condition
from operator_process import OperatorProcess
from stand_in_node import StandInNode


def test_puts_back_what_somebody_changed_or_deleted(
    api: ApiServer,
    operator: OperatorProcess,
    node: StandInNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("moemodels", tiny_model("tiny"))
    wait_condition(api, namespace, "tiny", "Ready")
    found = objects_of(api, namespace, "tiny")
    (deployment,) = found["deployments"]

    ports = [{"name": "http", "port": 1234, "protocol": "TCP", "targetPort": 8000}]
    api.patch("services", namespace, "tiny", {"spec": {"ports": ports}})
    api.patch("deployments", namespace, deployment, {"spec": {"replicas": 3}})
    for policy in found["networkpolicies"]:
        api.delete("networkpolicies", namespace, policy)

    eventually(
        lambda: api.get("services", namespace, "tiny")["spec"]["ports"],
        lambda ports: [port["port"] for port in ports] == [80],
    )
    eventually(
        lambda: api.get("deployments", namespace, deployment)["spec"]["replicas"],
        lambda replicas: replicas == 1,
    )
    eventually(lambda: objects_of(api, namespace, "tiny"), lambda now: now == found)


def test_leaves_a_service_of_somebody_else_alone_and_says_so(
    api: ApiServer,
    operator: OperatorProcess,
    node: StandInNode,
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
    found = wait_condition(api, namespace, "tiny", "Ready", status="False", reason="NameTaken")
    assert "tiny" in found["message"]
    assert api.get("services", namespace, "tiny") == before

    api.delete("services", namespace, "tiny")
    wait_condition(api, namespace, "tiny", "Ready")


def test_scales_routers_by_the_scale_subresource(
    api: ApiServer,
    operator: OperatorProcess,
    node: StandInNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("moemodels", tiny_model("tiny"))
    wait_condition(api, namespace, "tiny", "Ready")
    api.patch("moemodels", namespace, "tiny", {"spec": {"replicas": 2}}, subresource="scale")
    eventually(
        lambda: api.get("moemodels", namespace, "tiny")["status"]["router"],
        lambda router: router["readyReplicas"] == 2,
        timeout_s=120,
    )


def test_keeps_two_models_of_one_namespace_apart(
    api: ApiServer,
    operator: OperatorProcess,
    node: StandInNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    for name in ("one", "two"):
        api.create("moemodels", tiny_model(name, experts={"warmPool": 1}))
    for name in ("one", "two"):
        wait_condition(api, namespace, name, "Ready")
    kept = objects_of(api, namespace, "two")
    api.delete("moemodels", namespace, "one")
    eventually(lambda: objects_of(api, namespace, "one"), lambda found: found == {})
    assert objects_of(api, namespace, "two") == kept
    wait_condition(api, namespace, "two", "Ready")
