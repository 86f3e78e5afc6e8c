"""The chart as a conditional dependency of a parent chart, and labels that users add."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm import Helm, write_parent_chart


@pytest.mark.parametrize("is_enabled", [True, False])
def test_a_parent_chart_enables_and_disables_it(
    helm: Helm, tmp_path: Path, is_enabled: bool
) -> None:
    values = {"global": {"team": "ml"}, "faasmoe": {"enabled": is_enabled, "replicas": 2}}
    objects = render(helm, write_parent_chart(tmp_path, values))
    replicas = [o["spec"]["replicas"] for o in objects if o["kind"] == "Deployment"]
    assert replicas == ([2] if is_enabled else [])
    assert is_enabled or objects == []


def test_globals_of_a_parent_chart_reach_every_image(helm: Helm, tmp_path: Path) -> None:
    shared = {"imageRegistry": "registry.example", "imagePullSecrets": ["a", {"name": "b"}]}
    values = {
        "global": {**shared, "storageClass": "fast"},
        "faasmoe": {"gateway": {"enabled": True}},
    }
    objects = render(helm, write_parent_chart(tmp_path, values))
    pods = [o["spec"]["template"]["spec"] for o in objects if o["kind"] in ("Deployment", "Job")]
    assert len(pods) == 3
    for pod in pods:
        assert pod["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]
        for container in pod["containers"]:
            assert container["image"].startswith("registry.example/faasmoe/")


def render(helm: Helm, parent: Path) -> list[dict[str, Any]]:
    """Return the objects of a release of a parent chart."""
    result = helm.run("template", "shop", parent, "--include-crds")
    assert result.returncode == 0, result.stderr
    return [o for o in yaml.safe_load_all(result.stdout) if o]


def test_labels_of_users_never_duplicate_or_replace_those_of_the_chart(helm: Helm) -> None:
    labels = {"app.kubernetes.io/name": "other", "team": "ml"}
    values = {
        "podLabels": labels,
        "serviceMonitor": {"enabled": True, "labels": labels},
        "prometheusRule": {"enabled": True, "labels": labels},
        "dashboard": {"enabled": True, "labels": labels},
    }
    text = helm._template(values).stdout
    blocks = re.findall(r"labels:\n((?: +\S+: .*\n)+)", text)
    labelled = [block for block in blocks if "team: ml" in block]
    assert len(labelled) == 4
    for block in labelled:
        keys = re.findall(r"^ +(\S+): ", block, flags=re.MULTILINE)
        assert len(keys) == len(set(keys))
        assert "app.kubernetes.io/name: faasmoe-operator" in block
