"""Sandboxes without the claim serve from caches that a store server fills."""

from __future__ import annotations

from collections.abc import Callable

from apiserver import ApiServer, Object, eventually
from chat_client import chat
from fake_node import FakeNode
from moemodels import model_objects, router_pods, sandbox_pods, wait_for_condition
from operator_process import OperatorProcess


def volumes(pod: Object) -> dict[str, Object]:
    return {volume["name"]: volume for volume in pod["spec"]["volumes"]}


def test_a_model_with_caches_serves_the_same_text(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    model = tiny_model("tiny")
    model["spec"]["store"]["cache"] = {}
    api.create("moemodels", model)
    wait_for_condition(api, namespace, "tiny", "Ready")
    (router,) = router_pods(api, namespace, "tiny")
    text = chat(router)
    pods = eventually(lambda: sandbox_pods(api, namespace, "tiny"), bool)
    for pod in pods:
        assert "emptyDir" in volumes(pod)["cache"]
        assert not any("persistentVolumeClaim" in volume for volume in volumes(pod).values())
        assert "affinity" not in pod["spec"] or "podAffinity" not in pod["spec"]["affinity"]

    api.create("moemodels", tiny_model("plain"))
    wait_for_condition(api, namespace, "plain", "Ready")
    (router,) = router_pods(api, namespace, "plain")
    assert chat(router, model="plain") == text

    api.delete("moemodels", namespace, "tiny")
    eventually(lambda: model_objects(api, namespace, "tiny"), lambda found: found == {})


def test_pods_with_image_volumes_are_accepted(
    api: ApiServer, operator: OperatorProcess, namespace: str, tiny_model: Callable[..., Object]
) -> None:
    model = tiny_model("imaged")
    model["spec"]["store"] = {"source": "oci://registry.example.com/stores/tiny:1"}
    api.create("moemodels", model)
    job = eventually(lambda: api.find("jobs", namespace, "imaged-store"), bool)
    assert job is not None
    pods = eventually(
        lambda: api.list("pods", namespace, labels="app.kubernetes.io/component=store"), bool
    )
    assert volumes(pods[0])["store"]["image"]["reference"] == "registry.example.com/stores/tiny:1"
    assert api.find("persistentvolumeclaims", namespace, "imaged-store") is None
