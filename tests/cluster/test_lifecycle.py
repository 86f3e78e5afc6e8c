"""A MoEModel from creation to deletion: pods run, functions scale, tenants chat."""

from __future__ import annotations

from collections.abc import Callable

from apiserver import ApiServer, Object, eventually
from chat_client import chat
from fake_node import FakeNode
from moemodels import (
    function_by_pod,
    make_secret,
    model_objects,
    router_pods,
    sandbox_pods,
    wait_for_condition,
)
from operator_process import OperatorProcess

KEY = "sk-tests-acme"


def test_a_model_is_prepared_served_scaled_suspended_and_deleted(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("secrets", make_secret("acme-keys", namespace, {"first": KEY}))
    tenants = [{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}]
    api.create("moemodels", tiny_model("tiny", tenants=tenants))
    wait_for_condition(api, namespace, "tiny", "Ready")
    status = api.get("moemodels", namespace, "tiny")["status"]
    assert status["functions"] == {"total": 4, "active": 0, "replicas": 0}
    assert sandbox_pods(api, namespace, "tiny") == []

    (router,) = router_pods(api, namespace, "tiny")
    text = chat(router, tenant="acme", key=KEY)
    assert text == chat(router, tenant="acme", key=KEY)
    held = eventually(
        lambda: function_by_pod(api, namespace, "tiny"), lambda found: all(found.values())
    )
    assert held
    assert len(set(held.values())) == len(held)
    wait_for_condition(api, namespace, "tiny", "Active")

    eventually(lambda: sandbox_pods(api, namespace, "tiny"), lambda pods: pods == [])
    wait_for_condition(api, namespace, "tiny", "Active", status="False")
    assert chat(router, tenant="acme", key=KEY) == text

    api.patch("moemodels", namespace, "tiny", {"spec": {"suspend": True}})
    wait_for_condition(api, namespace, "tiny", "Ready", status="False", reason="Suspended")
    labels_of_pods = "faasmoe.dev/model=tiny,app.kubernetes.io/component in (router,sandbox)"
    eventually(lambda: api.list("pods", namespace, labels=labels_of_pods), lambda p: p == [])
    api.patch("moemodels", namespace, "tiny", {"spec": {"suspend": False}})
    wait_for_condition(api, namespace, "tiny", "Ready")
    (router,) = eventually(
        lambda: router_pods(api, namespace, "tiny"), lambda routers: len(routers) == 1
    )
    assert chat(router, tenant="acme", key=KEY) == text

    api.delete("moemodels", namespace, "tiny")
    eventually(lambda: model_objects(api, namespace, "tiny"), lambda found: found == {})
    assert api.find("secrets", namespace, "acme-keys") is not None
