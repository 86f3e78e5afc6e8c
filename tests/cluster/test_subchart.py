"""The chart as a conditional dependency: a parent chart's release switches it on and off."""

from __future__ import annotations

from pathlib import Path

from apiserver import ApiServer, eventually
from chart_install import CRDS
from helm import Helm, write_parent_chart
from release import Release, installed_release

NAME = "faasmoe-parent"
PLURALS = (
    "clusterroles",
    "clusterrolebindings",
    "deployments",
    "networkpolicies",
    "poddisruptionbudgets",
    "rolebindings",
    "roles",
    "serviceaccounts",
    "services",
    "validatingadmissionpolicies",
    "validatingadmissionpolicybindings",
)


def objects(api: ApiServer) -> set[tuple[str, str]]:
    """Return plural and name of the chart's objects that the release has in the cluster."""
    labels = f"app.kubernetes.io/instance={NAME},app.kubernetes.io/part-of=faasmoe"
    return {
        (plural, obj["metadata"]["name"])
        for plural in PLURALS
        for obj in api.list(plural, labels=labels)
    }


def test_a_parent_charts_release_switches_it_on_and_off(api: ApiServer, tmp_path: Path) -> None:
    shared = {"imagePullSecrets": ["registry"], "storageClass": "of-another-chart"}
    values = {"global": shared, "faasmoe": {"enabled": True, "replicas": 0}}
    chart = write_parent_chart(tmp_path, values)
    parent = Release(api, Helm.from_package(tmp_path), NAME, chart)
    with installed_release(parent, {}):
        installed = objects(api)
        assert {plural for plural, _ in installed} == set(PLURALS)
        deployment = api.get("deployments", NAME, f"{NAME}-operator")
        assert deployment["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": "registry"}]

        parent.upgrade({"faasmoe": {"enabled": False}})
        eventually(lambda: objects(api), lambda found: not found)
        assert all(api.find("customresourcedefinitions", "", crd) for crd in CRDS)

        parent.upgrade({"faasmoe": {"enabled": True}})
        assert objects(api) == installed
