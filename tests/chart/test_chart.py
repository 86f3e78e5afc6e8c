"""The chart as a whole: helm lint, Kubernetes schemas, checkov and documentation."""

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
def test_passes_strict_helm_lint(helm: Helm, values: Path) -> None:
    result = helm.run("lint", "--strict", CHART, "--values", values)
    assert result.returncode == 0, result.stdout


def test_crds_equal_those_of_the_project() -> None:
    compared = filecmp.dircmp(ROOT / "crds", CHART / "crds")
    assert compared.common_files
    assert not compared.left_only
    assert not compared.right_only
    for name in compared.common_files:
        assert (ROOT / "crds" / name).read_bytes() == (CHART / "crds" / name).read_bytes()


def test_versions_match_project_and_oldest_tested_kubernetes() -> None:
    import tomllib

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["appVersion"] == version
    assert chart["kubeVersion"] == f">={VERSIONS[0]}.0-0"


def test_objects_match_kubernetes_schemas(objects: list[Object]) -> None:
    for obj in objects:
        if obj["kind"] != "CustomResourceDefinition":
            check_schema(obj)


def test_object_names_are_unique(objects: list[Object]) -> None:
    assert max(Counter(map(object_key, objects)).values()) == 1


def test_objects_have_release_labels(objects: list[Object]) -> None:
    for obj in objects:
        if obj["kind"] == "CustomResourceDefinition" or obj.get("data") == {"hello": "world"}:
            continue
        labels = obj["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "faasmoe"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["helm.sh/chart"].startswith("faasmoe-")


def test_prometheus_objects_are_disabled_by_default(
    rendered: dict[str, list[Object]],
) -> None:
    optional = {"ServiceMonitor", "PrometheusRule"}
    assert not optional & {obj["kind"] for obj in rendered["default"]}
    assert optional <= {obj["kind"] for obj in rendered["everything"]}


def test_checkov_finds_no_unexplained_failure(
    rendered: dict[str, list[Object]], tmp_path: Path
) -> None:
    for name, objects in rendered.items():
        with (tmp_path / f"{name}.yaml").open("w") as file:
            yaml.safe_dump_all(objects, file)
    assert failed_checks(tmp_path, framework="kubernetes") == []


def test_readme_documents_every_value() -> None:
    text = (CHART / "README.md").read_text()
    for path in value_paths(yaml.safe_load((CHART / "values.yaml").read_text())):
        assert f"`{path}`" in text, f"README.md does not document {path}"


def value_paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted paths of all values; free-form maps and Kubernetes types are leaves."""
    leaves = {"podSecurityContext", "securityContext", "resources", "dashboard.labels"}
    leaves.add("gateway.resources")
    paths = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value and path not in leaves:
            paths += value_paths(value, f"{path}.")
        else:
            paths.append(path)
    return paths
