"""The chart installed with helm, with the operator in a pod."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import yaml
from apiserver import ApiServer, Object, eventually
from chart_install import CRDS
from helm import CHART, Helm
from real_nodes import HOSTNAME_LABEL, ProjectImages

RELEASE = NAMESPACE = "faasmoe-real-node"
"""Separate from what other tests install."""
TIMEOUT = "5m"
LABELS = "app.kubernetes.io/name=faasmoe-operator"
GATEWAY_LABELS = "app.kubernetes.io/name=faasmoe-gateway"
SMALL = {"requests": {"cpu": "50m", "memory": "128Mi"}}


@dataclass(frozen=True, slots=True)
class Release:
    """An installed release of the chart.

    Attributes:
        api: administrator client.
        helm: runs helm.
    """

    api: ApiServer
    helm: Helm

    def run(self, verb: str, *arguments: str) -> str:
        """Run a helm command on the release and return its output."""
        where = ["--namespace", NAMESPACE, "--kubeconfig", os.environ["KUBECONFIG"]]
        done = self.helm.run(verb, RELEASE, *arguments, *where, "--timeout", TIMEOUT)
        assert done.returncode == 0, f"helm {verb}: {done.stderr}{done.stdout}"
        return done.stdout

    def upgrade(self, values: Object) -> None:
        """Upgrade the release to other values and wait until its pods are ready."""
        file = self.helm.home / "upgrade.yaml"
        file.write_text(yaml.safe_dump(values))
        self.run("upgrade", str(CHART), "--reuse-values", "--wait", "--values", str(file))

    def gateway_url(self) -> str:
        """Return the URL of the gateways' Service."""
        (service,) = self.api.list("services", NAMESPACE, labels=GATEWAY_LABELS)
        return f"http://{service['metadata']['name']}.{NAMESPACE}.svc/v1"

    def operators(self) -> list[Object]:
        """Return the operator pods that are ready and not terminating."""
        pods = self.api.list("pods", NAMESPACE, labels=LABELS)
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and _ready(pod)]

    def replace_operator(self) -> None:
        """Delete the operator pod and wait until another one is ready."""
        (old,) = self.operators()
        self.api.delete("pods", NAMESPACE, old["metadata"]["name"])
        eventually(
            self.operators,
            lambda pods: pods and pods[0]["metadata"]["uid"] != old["metadata"]["uid"],
            timeout_s=180,
        )


@contextmanager
def installed_release(
    api: ApiServer, helm: Helm, images: ProjectImages, *, node: str
) -> Iterator[Release]:
    """Install the chart on a node; uninstall it at the end, with the CRDs if it installed them."""
    release = Release(api, helm)
    had_crd = _update_crd(api)
    file = helm.home / "release.yaml"
    file.write_text(yaml.safe_dump(_values(images, node)))
    try:
        options = ["--create-namespace", "--wait", "--values", str(file)]
        release.run("install", str(CHART), *options, *["--skip-crds"] * had_crd)
        yield release
    finally:
        release.run("uninstall", "--ignore-not-found", "--wait")
        api.delete("namespaces", "", NAMESPACE)
        eventually(lambda: api.find("namespaces", "", NAMESPACE), lambda found: not found)
        if not had_crd:
            for crd in CRDS:
                api.delete("customresourcedefinitions", "", crd)
                found = partial(api.find, "customresourcedefinitions", "", crd)
                eventually(found, lambda crd: not crd)


def _update_crd(api: ApiServer) -> bool:
    """Update the CRDs if they exist; return whether they do."""
    if not all(api.find("customresourcedefinitions", "", crd) for crd in CRDS):
        return False
    for path in (CHART / "crds").iterdir():
        api.apply("customresourcedefinitions", yaml.safe_load(path.read_text()))
    return True


def _values(images: ProjectImages, node: str) -> Object:
    return {
        "image": _image(images.operator),
        "models": {
            "routerImage": _image(images.router),
            "expertImage": _image(images.expert),
        },
        "nodeSelector": {HOSTNAME_LABEL: node},
        "resources": SMALL,
        "gateway": {
            "image": _image(images.gateway),
            "nodeSelector": {HOSTNAME_LABEL: node},
            "resources": SMALL,
        },
    }


def _image(name: str) -> Object:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}


def _ready(pod: Object) -> bool:
    found = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in found)
