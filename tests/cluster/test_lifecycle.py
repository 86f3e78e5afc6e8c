"""One MoEModel from apply to delete: its pods run, its functions come and go, tenants chat."""

from __future__ import annotations

import base64
from collections.abc import Callable

from apiserver import ApiServer, Object, eventually
from moemodels import objects_of, router_pods, sandboxes, wait_condition
from openai import OpenAI
from operator_process import OperatorProcess
from stand_in_node import StandInNode

KEY = "sk-tests-acme"
CHAT = [{"role": "user", "content": "the quick brown fox"}]


def test_a_model_is_prepared_and_served_scaled_suspended_and_deleted(
    api: ApiServer,
    operator: OperatorProcess,
    node: StandInNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("secrets", _secret("acme-keys", namespace, {"first": KEY}))
    tenants = [{"name": "acme", "apiKeysSecretRef": {"name": "acme-keys"}}]
    api.create("moemodels", tiny_model("tiny"))
    wait_condition(api, namespace, "tiny", "Ready")
    status = api.get("moemodels", namespace, "tiny")["status"]
    assert status["functions"] == {"total": 4, "active": 0, "replicas": 0}
    assert sandboxes(api, namespace, "tiny") == []

    (router,) = router_pods(api, namespace, "tiny")
    text = _chat(router)
    assert text == _chat(router)
    held = sandboxes(api, namespace, "tiny")
    assert held
    labels = [pod["metadata"]["labels"] for pod in held]
    assert all(pod["faasmoe.dev/pool"] == "assigned" for pod in labels)
    assert len({pod["faasmoe.dev/function"] for pod in labels}) == len(held)
    wait_condition(api, namespace, "tiny", "Active")

    eventually(lambda: sandboxes(api, namespace, "tiny"), lambda pods: pods == [])
    wait_condition(api, namespace, "tiny", "Active", status="False")
    assert _chat(router) == text

    api.patch("moemodels", namespace, "tiny", {"spec": {"suspend": True}})
    wait_condition(api, namespace, "tiny", "Ready", status="False", reason="Suspended")
    labels_of_pods = "faasmoe.dev/model=tiny,app.kubernetes.io/component in (router,sandbox)"
    eventually(lambda: api.list("pods", namespace, labels=labels_of_pods), lambda p: p == [])
    api.patch("moemodels", namespace, "tiny", {"spec": {"suspend": False}})
    wait_condition(api, namespace, "tiny", "Ready")
    (router,) = eventually(
        lambda: router_pods(api, namespace, "tiny"), lambda routers: len(routers) == 1
    )
    assert _chat(router) == text

    api.delete("moemodels", namespace, "tiny")
    eventually(lambda: objects_of(api, namespace, "tiny"), lambda found: found == {})
    assert api.find("secrets", namespace, "acme-keys") is not None


def _secret(name: str, namespace: str, values: dict[str, str]) -> Object:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    meta = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": data}


def _chat(router: Object) -> str:
    url = f"http://{router['status']['podIP']}:8000/v1"
    with OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=8, temperature=0
        )
    return answer.choices[0].message.content or ""
