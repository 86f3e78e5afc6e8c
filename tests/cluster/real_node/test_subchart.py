"""A parent chart's release runs the operator, and stops it."""

from __future__ import annotations

from pathlib import Path

import pytest
from apiserver import ApiServer, eventually
from helm import Helm, write_parent_chart
from real_nodes import ProjectImages
from release import Release, installed_release, node_values

pytestmark = pytest.mark.timeout(900)  # images start slowly on few cores


def test_the_operator_of_a_parent_charts_release_becomes_ready(
    api: ApiServer, host: str, images: ProjectImages, tmp_path: Path
) -> None:
    chart = write_parent_chart(tmp_path, {"faasmoe": {"enabled": True}})
    parent = Release(api, Helm.from_package(tmp_path), "faasmoe-parent", chart)
    with installed_release(parent, {"faasmoe": node_values(images, host)}):
        assert len(parent.operators()) == 1
        assert "Succeeded" in parent.run("test")
        parent.upgrade({"faasmoe": {"enabled": False}})
        eventually(parent.operators, lambda pods: pods == [])
