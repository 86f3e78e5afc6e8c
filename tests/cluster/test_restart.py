"""The operator is killed and restarted at bad moments: nothing is lost or done twice."""

from __future__ import annotations

import threading
from collections.abc import Callable

from apiserver import ApiServer, Object, eventually
from chat_client import chat
from fake_node import FakeNode
from moemodels import function_by_pod, model_objects, router_pods, sandbox_pods, wait_for_condition
from operator_process import OperatorProcess

LONG_WINDOW = {"scaling": {"windowSeconds": 600}}


def test_a_new_operator_completes_what_a_killed_one_started(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    api.create("moemodels", tiny_model("tiny"))
    labels = "faasmoe.dev/model=tiny"
    eventually(lambda: api.list("serviceaccounts", namespace, labels=labels), bool)
    operator.kill()  # while it creates the model's objects
    operator.start()
    wait_for_condition(api, namespace, "tiny", "Ready")
    found = model_objects(api, namespace, "tiny")
    assert len(found["deployments"]) == len(found["jobs"]) == len(found["secrets"]) == 1


def test_serves_while_the_operator_is_down_and_restores_its_sandboxes(
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
    before = eventually(
        lambda: function_by_pod(api, namespace, "tiny"), lambda found: found and all(found.values())
    )

    operator.kill()
    assert chat(router) == text
    operator.start()
    wait_for_condition(api, namespace, "tiny", "Active")
    assert chat(router) == text
    assert function_by_pod(api, namespace, "tiny") == before


def test_no_request_fails_while_routers_and_sandboxes_are_replaced(
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
    old = {pod["metadata"]["uid"] for pod in sandbox_pods(api, namespace, "tiny")}

    with _ChatTraffic(api, namespace) as traffic:
        change = {
            "granularity": {"expertsPerFunction": 4},
            "experts": {"template": {"labels": {"team": "blue"}}},
            "router": {"template": {"labels": {"team": "blue"}}},
        }
        api.patch("moemodels", namespace, "tiny", {"spec": change})
        eventually(
            lambda: api.get("moemodels", namespace, "tiny")["status"],
            lambda status: status["observedGeneration"] == 2 and status["functions"]["total"] == 2,
        )
        eventually(
            lambda: router_pods(api, namespace, "tiny"),
            lambda pods: len(pods) == 1 and pods[0]["metadata"]["labels"].get("team") == "blue",
            timeout_s=180,
        )
        eventually(
            lambda: {pod["metadata"]["uid"] for pod in sandbox_pods(api, namespace, "tiny")},
            lambda uids: uids and not uids & old,
        )
    assert traffic.errors == []
    assert set(traffic.texts) == {text}
    assert len(traffic.texts) > 5


class _ChatTraffic:
    """Sends requests continuously to a ready router that is not terminating, as a Service would."""

    def __init__(self, api: ApiServer, namespace: str) -> None:
        self.texts: list[str] = []
        self.errors: list[str] = []
        self._api = ApiServer(api.credentials)
        self._namespace = namespace
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _ChatTraffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._api.close()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                router = router_pods(self._api, self._namespace, "tiny")[-1]
                self.texts.append(chat(router))
            except Exception as error:  # every failure is recorded
                self.errors.append(f"{type(error).__name__}: {error}")
