"""The chart's admission policy keeps the operator to its own objects, whatever RBAC grants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from apiserver import ApiRequestError, ApiServer, Object, eventually
from operator_process import NAMESPACE

DENIED = "the FaaSMoE operator may"
OWN = {"app.kubernetes.io/managed-by": "faasmoe-operator"}


@pytest.fixture
def as_operator(api: ApiServer, service_account: str) -> Iterator[ApiServer]:
    """A client with the operator's token, as one who has stolen it."""
    token = api.create_token(NAMESPACE, service_account)
    client = ApiServer(api.credentials.with_token(token))
    yield client
    client.close()


def config_map(namespace: str, name: str, labels: dict[str, str] | None = None) -> Object:
    meta = {"name": name, "namespace": namespace, "labels": labels or {}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"key": "value"}}


def pod(namespace: str, *, container: Object | None = None, **spec: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "own", "namespace": namespace, "labels": OWN},
        "spec": {
            "automountServiceAccountToken": False,
            "containers": [{"name": "main", "image": "local/none:1", **(container or {})}],
            **spec,
        },
    }


@pytest.fixture
def open_namespace(api: ApiServer, namespace: str) -> str:
    """A namespace without a Pod Security Standard, which would deny such pods too."""
    labels = {"pod-security.kubernetes.io/enforce": "privileged"}
    api.patch("namespaces", "", namespace, {"metadata": {"labels": labels}})
    return namespace


def is_denied(call: Any, *arguments: Any) -> bool:
    """Return whether the policy denies a request; other errors are raised."""
    try:
        call(*arguments)
    except ApiRequestError as error:
        if DENIED in str(error):
            return True
        raise
    return False


def test_objects_of_others_stay_as_they_are(
    api: ApiServer, as_operator: ApiServer, namespace: str
) -> None:
    api.create("configmaps", config_map(namespace, "foreign"))
    change = {"data": {"key": "changed"}}
    # Policies take effect some seconds after they are created.
    eventually(
        lambda: is_denied(as_operator.patch, "configmaps", namespace, "foreign", change), bool
    )
    assert is_denied(as_operator.delete, "configmaps", namespace, "foreign")
    assert is_denied(as_operator.create, "configmaps", config_map(namespace, "new"))
    assert not is_denied(as_operator.create, "configmaps", config_map(namespace, "own", OWN))
    assert not is_denied(as_operator.patch, "configmaps", namespace, "own", change)
    assert not is_denied(as_operator.delete, "configmaps", namespace, "own")
    assert not is_denied(api.delete, "configmaps", namespace, "foreign")


@pytest.mark.parametrize(
    "dangerous",
    [
        pytest.param({"hostNetwork": True}, id="host-network"),
        pytest.param({"hostPID": True}, id="host-pid"),
        pytest.param({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, id="host-path"),
        pytest.param({"container": {"securityContext": {"privileged": True}}}, id="privileged"),
        pytest.param({"automountServiceAccountToken": True}, id="token"),
    ],
)
def test_pods_with_access_to_node_or_api_are_denied(
    as_operator: ApiServer, open_namespace: str, dangerous: dict[str, Any]
) -> None:
    request = pod(open_namespace, **dangerous)
    eventually(lambda: is_denied(_create_and_delete, as_operator, request), bool)
    assert not is_denied(_create_and_delete, as_operator, pod(open_namespace))


def _create_and_delete(client: ApiServer, request: Object) -> None:
    """Create a pod and delete it, if it was created before the policy took effect."""
    client.create("pods", request)
    meta = request["metadata"]
    client.delete("pods", meta["namespace"], meta["name"], gracePeriodSeconds=0)
