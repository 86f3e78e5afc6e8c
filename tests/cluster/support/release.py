"""The chart installed with helm, with the operator in a pod."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from apiserver import ApiServer, Object, eventually
from chart_install import CRDS
from helm import CHART, Helm
from real_nodes import HOSTNAME_LABEL, ProjectImages

NAME = "faasmoe-real-node"
"""Separate from what other tests install."""
TIMEOUT = "5m"
LABELS = "app.kubernetes.io/name=faasmoe-operator"
GATEWAY_LABELS = "app.kubernetes.io/name=faasmoe-gateway"
SMALL = {"requests": {"cpu": "50m", "memory": "128Mi"}}


@dataclass(frozen=True, slots=True)
class Release:
    """A release of the chart, or of a chart that depends on it, in the namespace of its name.

    Attributes:
        api: administrator client.
        helm: runs helm.
        name: name of the release and of its namespace.
        chart: folder of the chart.
    """

    api: ApiServer
    helm: Helm
    name: str = NAME
    chart: Path = CHART

    def run(self, verb: str, *arguments: str) -> str:
        """Run a helm command on the release and return its output."""
        where = ["--namespace", self.name, "--kubeconfig", os.environ["KUBECONFIG"]]
        done = self.helm.run(verb, self.name, *arguments, *where, "--timeout", TIMEOUT)
        assert done.returncode == 0, f"helm {verb}: {done.stderr}{done.stdout}"
        return done.stdout

    def upgrade(self, values: Object) -> None:
        """Upgrade the release to other values and wait until its pods are ready."""
        file = self.helm.home / "upgrade.yaml"
        file.write_text(yaml.safe_dump(values))
        self.run("upgrade", str(self.chart), "--reuse-values", "--wait", "--values", str(file))

    def gateway_url(self) -> str:
        """Return the URL of the gateways' Service."""
        (service,) = self.api.list("services", self.name, labels=GATEWAY_LABELS)
        return f"http://{service['metadata']['name']}.{self.name}.svc/v1"

    def operators(self) -> list[Object]:
        """Return the operator pods that are ready and not terminating."""
        return self._ready_pods(LABELS)

    def gateways(self) -> list[Object]:
        """Return the gateway pods that are ready and not terminating."""
        return self._ready_pods(GATEWAY_LABELS)

    def _ready_pods(self, labels: str) -> list[Object]:
        pods = self.api.list("pods", self.name, labels=labels)
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and _ready(pod)]

    def replace_operator(self) -> None:
        """Delete the operator pod and wait until another one is ready."""
        (old,) = self.operators()
        self.api.delete("pods", self.name, old["metadata"]["name"])
        eventually(
            self.operators,
            lambda pods: pods and pods[0]["metadata"]["uid"] != old["metadata"]["uid"],
            timeout_s=180,
        )


@contextmanager
def installed_release(release: Release, values: Object) -> Iterator[Release]:
    """Install a release; uninstall it at the end, with the CRDs if it installed them."""
    api = release.api
    had_crd = _update_crd(api)
    file = release.helm.home / "release.yaml"
    file.write_text(yaml.safe_dump(values))
    try:
        options = ["--create-namespace", "--wait", "--values", str(file)]
        release.run("install", str(release.chart), *options, *["--skip-crds"] * had_crd)
        yield release
    finally:
        release.run("uninstall", "--ignore-not-found", "--wait")
        api.delete("namespaces", "", release.name)
        eventually(lambda: api.find("namespaces", "", release.name), lambda found: not found)
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


def node_values(images: ProjectImages, node: str) -> Object:
    """Return values of the chart for pods of these images on one node."""
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


def make_known(api: ApiServer, namespace: str, host: str) -> None:
    """Make a host name resolvable in the namespace's pods by a Service without endpoints."""
    spec = {"ports": [{"port": 80}]}
    meta = {"name": host, "namespace": namespace}
    api.create("services", {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})


def _image(name: str) -> Object:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}


def _ready(pod: Object) -> bool:
    found = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in found)
