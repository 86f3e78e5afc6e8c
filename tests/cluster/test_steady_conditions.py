"""Conditions follow what users can do: they stay as they are while healthy parts are replaced."""

from __future__ import annotations

from collections.abc import Callable

from apiserver import ApiServer, Object, eventually
from chat_client import chat
from fake_node import FakeNode
from moemodels import (
    conditions,
    function_by_pod,
    make_secret,
    router_pods,
    sandbox_pods,
    wait_for_condition,
)
from operator_process import OperatorProcess

LONG_WINDOW = {"scaling": {"windowSeconds": 600}}
N_TENANTS = 50


def warnings(api: ApiServer, namespace: str) -> list[str]:
    """Return reason and number of the warnings about MoEModels, sorted."""
    return sorted(
        f"{event['reason']}: {event.get('count')} {event.get('series', {}).get('count')}"
        for event in api.list("events", namespace)
        if event["type"] == "Warning" and event["involvedObject"]["kind"] == "MoEModel"
    )


def test_ready_does_not_change_while_a_healthy_sandbox_is_replaced(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("moemodels", tiny_model("tiny", experts=LONG_WINDOW))
    wait_for_condition(api, namespace, "tiny", "Ready")
    (router,) = router_pods(api, namespace, "tiny")
    text = chat(router)
    held = eventually(
        lambda: function_by_pod(api, namespace, "tiny"), lambda found: found and all(found.values())
    )
    wait_for_condition(api, namespace, "tiny", "Active")
    before = conditions(api, namespace, "tiny")["Ready"]["lastTransitionTime"]
    told = warnings(api, namespace)  # such as of a claim that was not bound at once
    (victim, *_) = sandbox_pods(api, namespace, "tiny")
    api.delete("pods", namespace, victim["metadata"]["name"])
    eventually(
        lambda: function_by_pod(api, namespace, "tiny"),
        lambda found: (
            victim["metadata"]["uid"] not in found
            and sorted(found.values()) == sorted(held.values())
        ),
        timeout_s=180,
    )
    assert chat(router) == text
    after = wait_for_condition(api, namespace, "tiny", "Ready")
    assert after["lastTransitionTime"] == before
    # Times have whole seconds; a change within one is told by an event.
    assert warnings(api, namespace) == told


def test_fifty_tenants_have_services_and_do_not_delay_replicas(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("moemodels", tiny_model("tiny"))
    wait_for_condition(api, namespace, "tiny", "Ready")
    names = [f"tenant-{number}" for number in range(N_TENANTS)]
    for name in names:
        api.create("secrets", make_secret(name, namespace, {"key": f"sk-{name}"}))
    tenants = [{"name": name, "apiKeysSecretRef": {"name": name}} for name in names]
    api.patch("moemodels", namespace, "tiny", {"spec": {"tenants": tenants}})
    api.patch("moemodels", namespace, "tiny", {"spec": {"router": {"replicas": 2}}})
    eventually(
        lambda: api.get("deployments", namespace, "tiny-router")["spec"]["replicas"],
        lambda replicas: replicas == 2,
    )
    labels = "faasmoe.dev/model=tiny,faasmoe.dev/tenant"
    services = eventually(
        lambda: api.list("services", namespace, labels=labels), lambda found: len(found) == 50
    )
    assert {s["metadata"]["labels"]["faasmoe.dev/tenant"] for s in services} == set(names)


def test_a_namespace_that_is_deleted_leaves_no_complaint(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("moemodels", tiny_model("tiny", experts={"warmPool": 1}))
    wait_for_condition(api, namespace, "tiny", "Ready")
    n_logged = len(operator.log())
    forbidden = operator.metric("faasmoe_operator_api_requests_total", code="403")
    api.delete("namespaces", "", namespace)
    eventually(lambda: api.find("namespaces", "", namespace), lambda found: not found)
    logged = operator.log()[n_logged:]
    assert "ERROR" not in logged
    assert "WARNING" not in logged
    assert operator.metric("faasmoe_operator_api_requests_total", code="403") == forbidden
