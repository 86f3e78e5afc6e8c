"""Requests of sandbox pods follow what is attached, by the API server's pods/resize."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from apiserver import ApiServer, Object, eventually
from chat_client import chat
from fake_node import FakeNode
from model_contexts import make_context
from moemodels import function_by_pod, router_pods, sandbox_pods, wait_for_condition
from operator_process import NAMESPACE, OperatorProcess

from faasmoe_operator.kube.client import KubeClient
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.manifests import sandbox_pod
from faasmoe_operator.kube.manifests.resources import request_quantities
from faasmoe_operator.kube.manifests.sandbox import SANDBOX_CONTAINER
from faasmoe_operator.kube.pod_resizer import pod_requests
from faasmoe_operator.kube.transport import KubeTransport, load_client_configuration
from faasmoe_operator.kube.types import POD_RESIZE
from faasmoe_operator.plan.pod_requests import PodRequests

IDLE = PodRequests(50, 512 << 20)
GROWN = PodRequests(1000, 832 << 20)


@pytest.fixture
def requests_of(api: ApiServer, namespace: str) -> Callable[[], dict[str, PodRequests]]:
    """Return what each sandbox pod requests, by its uid."""

    def read() -> dict[str, PodRequests]:
        pods = sandbox_pods(api, namespace, "tiny")
        return {pod["metadata"]["uid"]: pod_requests(pod) for pod in pods}

    return read


@pytest.fixture
def empty_node(api: ApiServer) -> Iterator[str]:
    """A node in name only."""
    name = "resizing"
    api.apply("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    room = {"cpu": "4", "memory": "16Gi", "pods": "10"}
    status = {"status": {"capacity": room, "allocatable": room}}
    api.patch("nodes", "", name, status, subresource="status")
    yield name
    api.delete("nodes", "", name)


@pytest.mark.parametrize("is_own", [True, False])
def test_the_operators_account_may_resize_its_own_pods_alone(
    api: ApiServer,
    service_account: str,
    namespace: str,
    empty_node: str,
    tmp_path: Path,
    is_own: bool,
) -> None:
    if "pods/resize" not in api.core_resources():
        pytest.skip("the API server has no pods/resize")
    pod = sandbox_pod(make_context(can_resize=True), name="sandbox")
    del pod["metadata"]["ownerReferences"]
    pod["metadata"]["namespace"] = namespace
    if not is_own:
        del pod["metadata"]["labels"]["app.kubernetes.io/managed-by"]
    pod["spec"] |= {"serviceAccountName": "default", "nodeName": empty_node}
    api.create("pods", pod)
    kubeconfig = tmp_path / "kubeconfig"
    token = api.create_token(NAMESPACE, service_account)
    kubeconfig.write_text(api.credentials.kubeconfig_for(token, namespace=namespace))

    async def resize() -> Object:
        configuration = await load_client_configuration({"KUBECONFIG": str(kubeconfig)})
        async with KubeClient(KubeTransport(configuration)) as client:
            assert await client.is_served(POD_RESIZE)
            return await client.resize_pod(
                namespace,
                "sandbox",
                container=SANDBOX_CONTAINER,
                requests=request_quantities(GROWN),
            )

    if is_own:
        assert pod_requests(asyncio.run(resize())) == GROWN
        resized = api.get("pods", namespace, "sandbox")
        assert pod_requests(resized) == GROWN
        before = pod["spec"]["containers"][0]["resources"]["limits"]
        assert resized["spec"]["containers"][0]["resources"]["limits"] == before
    else:
        with pytest.raises(KubeApiError, match="may change only objects with the label"):
            asyncio.run(resize())
    api.delete("pods", namespace, "sandbox", gracePeriodSeconds=0)


def test_pods_grow_at_attach_and_shrink_at_detach(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
    requests_of: Callable[[], dict[str, PodRequests]],
) -> None:
    if "pods/resize" not in api.core_resources():
        pytest.skip("the API server has no pods/resize")
    experts = {"warmPool": 4, "functionsPerSandbox": 1, "scaling": {"windowSeconds": 600}}
    api.create("moemodels", tiny_model("tiny", experts=experts))
    wait_for_condition(api, namespace, "tiny", "Ready")
    eventually(requests_of, lambda pods: list(pods.values()) == [IDLE] * 4)
    qos = {pod["status"]["qosClass"] for pod in sandbox_pods(api, namespace, "tiny")}
    assert qos == {"Burstable"}

    (router,) = router_pods(api, namespace, "tiny")
    chat(router)
    held = eventually(
        lambda: {p for p, f in function_by_pod(api, namespace, "tiny").items() if f}, bool
    )
    grown = eventually(
        requests_of,
        lambda pods: any(pods.get(name, IDLE) != IDLE for name in held),
        timeout_s=240,
    )
    for requests in grown.values():
        assert requests == IDLE or (
            requests.cpu_millis == 1000 and requests.memory_bytes > IDLE.memory_bytes
        )
    scaling = {
        "windowSeconds": 6,
        "panicWindowPercentage": 20,
        "scaleToZeroGracePeriodSeconds": 0,
    }
    api.patch("moemodels", namespace, "tiny", {"spec": {"experts": {"scaling": scaling}}})
    eventually(requests_of, lambda pods: set(pods.values()) == {IDLE}, timeout_s=240)


def test_a_fixed_size_is_requested_from_the_start(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
    requests_of: Callable[[], dict[str, PodRequests]],
) -> None:
    api.create("moemodels", tiny_model("tiny", experts={"warmPool": 1, "resize": "none"}))
    pods = eventually(requests_of, lambda pods: len(pods) == 1)
    (requests,) = pods.values()
    assert requests.cpu_millis == 1000
    assert requests.memory_bytes > IDLE.memory_bytes
