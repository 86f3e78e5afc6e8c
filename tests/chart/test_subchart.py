"""The chart as a conditional dependency of a parent chart, and labels that users add."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm import CHART, Helm


def parent_chart(folder: Path, values: dict[str, Any]) -> Path:
    """Write a chart that depends on this one under the condition `faasmoe.enabled`."""
    parent = folder / "parent"
    (parent / "charts").mkdir(parents=True)
    shutil.copytree(CHART, parent / "charts" / "faasmoe")
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    chart = {
        "apiVersion": "v2",
        "name": "parent",
        "version": "1.0.0",
        "dependencies": [
            {"name": "faasmoe", "version": version, "condition": "faasmoe.enabled"},
        ],
    }
    (parent / "Chart.yaml").write_text(yaml.safe_dump(chart))
    (parent / "values.yaml").write_text(yaml.safe_dump(values))
    return parent


@pytest.mark.parametrize("is_enabled", [True, False])
def test_a_parent_chart_enables_and_disables_it(
    helm: Helm, tmp_path: Path, is_enabled: bool
) -> None:
    values = {"global": {"team": "ml"}, "faasmoe": {"enabled": is_enabled, "replicas": 2}}
    result = helm.run("template", "shop", parent_chart(tmp_path, values))
    assert result.returncode == 0, result.stderr
    kinds = [o["kind"] for o in yaml.safe_load_all(result.stdout) if o]
    assert ("Deployment" in kinds) == is_enabled


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
