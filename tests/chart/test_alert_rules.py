"""Outages raise the chart's alerts: promtool plays recorded series against the rendered rules.

Needs Prometheus' promtool on the PATH (Debian's package `prometheus`); `make test-alerts` fails
without it, other runs skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helm import Helm

CASES = Path(__file__).with_name("alert_rules.test.yaml")


def test_outages_raise_their_alerts(helm: Helm, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert "REQUIRE_PROMTOOL" not in os.environ, "promtool is not on the PATH"
        pytest.skip("promtool is not on the PATH")
    objects = helm.template({"prometheusRule": {"enabled": True}})
    (rules,) = (o["spec"] for o in objects if o["kind"] == "PrometheusRule")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(CASES, tmp_path / CASES.name)
    result = subprocess.run(
        [promtool, "test", "rules", CASES.name], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
