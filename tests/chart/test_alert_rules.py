"""Outages raise the chart's alerts: promtool plays recorded series against the rendered rules.

Needs Prometheus' promtool on the PATH (Debian's package `prometheus`); `make test-alerts` fails
without it, other runs skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm import Helm

CASES = Path(__file__).with_name("alert_rules.test.yaml")


@pytest.fixture
def rules(helm: Helm) -> dict[str, Any]:
    """The chart's rules."""
    objects = helm.template({"prometheusRule": {"enabled": True}})
    (spec,) = (o["spec"] for o in objects if o["kind"] == "PrometheusRule")
    return dict(spec)


def test_outages_raise_their_alerts(rules: dict[str, Any], tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert "REQUIRE_PROMTOOL" not in os.environ, "promtool is not on the PATH"
        pytest.skip("promtool is not on the PATH")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(CASES, tmp_path / CASES.name)
    result = subprocess.run(
        [promtool, "test", "rules", CASES.name], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_seen_to_fire_and_to_stay_silent(rules: dict[str, Any]) -> None:
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    checks = [
        (check["alertname"], bool(check["exp_alerts"]))
        for case in yaml.safe_load(CASES.read_text())["tests"]
        for check in case["alert_rule_test"]
    ]
    assert {alert for alert, fires in checks if fires} == alerts
    assert {alert for alert, fires in checks if not fires} == alerts
