"""The chart as a whole: what helm, Kubernetes and checkov say of it."""

import filecmp
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm import CHART, ROOT, Helm
from kubernetes_schemas import VERSIONS, check_schema
from security_checks import failed_checks

from faasmoe_operator.kube.types import Object

VALUES = sorted(CHART.glob("ci/*-values.yaml"))


def object_key(obj: Object) -> tuple[str, str, str]:
    return obj["kind"], obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


@pytest.mark.parametrize("values", VALUES, ids=[path.stem for path in VALUES])
def test_helm_lints_it_strictly(helm: Helm, values: Path) -> None:
    done = helm.run("lint", "--strict", CHART, "--values", values)
    assert done.returncode == 0, done.stdout


def test_the_crds_are_those_of_the_project() -> None:
    compared = filecmp.dircmp(ROOT / "crds", CHART / "crds")
    assert compared.common_files
    assert not compared.left_only
    assert not compared.right_only
    for name in compared.common_files:
        assert (ROOT / "crds" / name).read_bytes() == (CHART / "crds" / name).read_bytes()


def test_it_is_the_projects_version_and_asks_for_the_oldest_kubernetes_that_is_tested() -> None:
    import tomllib

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["appVersion"] == version
    assert chart["kubeVersion"] == f">={VERSIONS[0]}.0-0"


def test_kubernetes_takes_every_object(objects: list[Object]) -> None:
    for obj in objects:
        if obj["kind"] != "CustomResourceDefinition":
            check_schema(obj)


def test_no_two_objects_have_the_same_name(objects: list[Object]) -> None:
    assert max(Counter(map(object_key, objects)).values()) == 1


def test_every_object_says_to_which_release_it_belongs(objects: list[Object]) -> None:
    for obj in objects:
        if obj["kind"] == "CustomResourceDefinition" or obj.get("data") == {"hello": "world"}:
            continue
        labels = obj["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "faasmoe"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["helm.sh/chart"].startswith("faasmoe-")


def test_what_needs_other_operators_is_off_by_default(
    rendered: dict[str, list[Object]],
) -> None:
    optional = {"ServiceMonitor", "PrometheusRule"}
    assert not optional & {obj["kind"] for obj in rendered["default"]}
    assert optional <= {obj["kind"] for obj in rendered["everything"]}


def test_checkov_finds_no_fault_that_is_not_explained(
    rendered: dict[str, list[Object]], tmp_path: Path
) -> None:
    for name, objects in rendered.items():
        with (tmp_path / f"{name}.yaml").open("w") as file:
            yaml.safe_dump_all(objects, file)
    assert failed_checks(tmp_path, framework="kubernetes") == []


def test_every_value_is_described_where_it_stands() -> None:
    text = (CHART / "README.md").read_text()
    for path in value_paths(yaml.safe_load((CHART / "values.yaml").read_text())):
        assert f"`{path}`" in text, f"README.md does not tell of {path}"


def value_paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the paths of values; a map that is free or of Kubernetes' making is one."""
    whole = {"podSecurityContext", "securityContext", "resources", "dashboard.labels"}
    found = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value and path not in whole:
            found += value_paths(value, f"{path}.")
        else:
            found.append(path)
    return found
