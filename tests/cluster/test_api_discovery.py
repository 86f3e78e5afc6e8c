"""An optional API is installed and removed while the operator runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from apiserver import ApiServer, Object, eventually
from fake_node import FakeNode
from moemodels import wait_for_condition
from operator_process import OperatorProcess

GROUP = "monitoring.coreos.com"
CRD = f"servicemonitors.{GROUP}"
REMOVED_S = 60.0
"""The watch ends with the API, and resuming it fails with 404."""


@contextmanager
def service_monitors(api: ApiServer) -> Iterator[None]:
    """Serve ServiceMonitors without a schema."""
    names = {"plural": "servicemonitors", "singular": "servicemonitor", "kind": "ServiceMonitor"}
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": CRD},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }
    api.create("customresourcedefinitions", crd)
    try:
        yield
    finally:
        api.delete("customresourcedefinitions", "", CRD)
        eventually(lambda: api.find("customresourcedefinitions", "", CRD), lambda found: not found)


def test_uses_an_api_when_it_appears_and_reports_when_it_is_removed(
    api: ApiServer,
    operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
) -> None:
    if api.find("customresourcedefinitions", "", CRD) is not None:
        pytest.skip(f"{CRD} is already installed")
    api.create("moemodels", tiny_model("tiny", monitoring={"serviceMonitor": {}}))
    found = wait_for_condition(
        api, namespace, "tiny", "Ready", status="False", reason="CRDNotInstalled"
    )
    assert f"{GROUP}/v1" in found["message"]

    with service_monitors(api):
        wait_for_condition(api, namespace, "tiny", "Ready")
        monitor = api.get("servicemonitors", namespace, "tiny-router")
        assert monitor["spec"]["targetLabels"] == ["faasmoe.dev/model"]
    wait_for_condition(
        api,
        namespace,
        "tiny",
        "Ready",
        status="False",
        reason="CRDNotInstalled",
        timeout_s=REMOVED_S,
    )
