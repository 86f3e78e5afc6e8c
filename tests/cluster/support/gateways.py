"""The chart's gateways on the fake node, with an operator that serves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apiserver import ApiServer, Object, eventually
from faasmoe_up import free_port
from fake_node import FakeNode
from helm import Helm
from operator_process import NAMESPACE, OperatorProcess

NAME = "faasmoe-gateway"
REPLICAS = 2
LABELS = f"app.kubernetes.io/name={NAME}"
ADDRESS_VARIABLE = "FAASMOE_CONTROL_ADDRESS"


@contextmanager
def running_gateways(
    api: ApiServer, node: FakeNode, helm: Helm, folder: Path, *, service_account: str
) -> Iterator[OperatorProcess]:
    """Run an operator and the chart's Deployment of gateways."""
    port = free_port()
    settings = {"GATEWAY_PORT": str(port)}
    operator = OperatorProcess(api, folder, service_account=service_account, settings=settings)
    operator.start()
    values = {"gateway": {"enabled": True, "replicas": REPLICAS, "nodeSelector": node.selector}}
    (deployment,) = (
        o
        for o in helm.template(values)
        if o["kind"] == "Deployment" and o["metadata"]["name"] == NAME
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        if variable["name"] == ADDRESS_VARIABLE:  # service names do not resolve on the fake node
            variable["value"] = f"127.0.0.1:{port}"
    api.apply("deployments", deployment)
    try:
        eventually(lambda: gateway_pods(api), lambda pods: len(pods) == REPLICAS, timeout_s=120)
        yield operator
    finally:
        api.delete("deployments", NAMESPACE, NAME, propagationPolicy="Background")
        eventually(lambda: api.list("pods", NAMESPACE, labels=LABELS), lambda pods: pods == [])
        operator.stop()


def gateway_pods(api: ApiServer) -> list[Object]:
    """Return the gateways that are ready."""
    return [pod for pod in api.list("pods", NAMESPACE, labels=LABELS) if _is_ready(pod)]


def _is_ready(pod: Object) -> bool:
    found = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in found)
