"""Values that the schema rejects, and the error messages."""

from typing import Any

import pytest
import yaml
from helm import CHART, Helm

REJECTED: list[tuple[str, dict[str, Any], str]] = [
    ("unknown", {"replica": 1}, "additional properties 'replica' not allowed"),
    ("unknown-below", {"log": {"levle": "INFO"}}, "additional properties 'levle' not allowed"),
    ("replicas", {"replicas": -1}, "at '/replicas'"),
    ("replicas-text", {"replicas": "1"}, "at '/replicas': got string, want integer"),
    ("workers", {"workers": 65}, "at '/workers'"),
    ("log-level", {"log": {"level": "debug"}}, "at '/log/level'"),
    ("log-format", {"log": {"format": "xml"}}, "at '/log/format'"),
    ("latest", {"image": {"tag": "latest"}}, "image.tag: got latest, expected a version"),
    (
        "latest-router",
        {"models": {"routerImage": {"tag": "latest"}}},
        "models.routerImage.tag: got latest",
    ),
    ("no-image", {"image": None}, "image: got <nil>, expected registry, repository, tag"),
    ("digest", {"image": {"digest": "sha256:abc"}}, "at '/image/digest'"),
    ("repository", {"image": {"repository": "Has Spaces"}}, "at '/image/repository'"),
    ("pull-policy", {"image": {"pullPolicy": "Sometimes"}}, "at '/image/pullPolicy'"),
    ("pull-secret", {"imagePullSecrets": ["a"]}, "at '/imagePullSecrets/0'"),
    ("namespace", {"watchNamespaces": ["Has Spaces"]}, "at '/watchNamespaces/0'"),
    ("namespace-twice", {"watchNamespaces": ["a", "a"]}, "at '/watchNamespaces'"),
    ("all-namespaces", {"watchNamespaces": ["*"]}, "at '/watchNamespaces/0'"),
    ("port", {"service": {"port": 80}}, "at '/service/port'"),
    ("own-env", {"extraEnv": [{"name": "FAASMOE_OPERATOR_PORT"}]}, "at '/extraEnv/0/name'"),
    ("env-name", {"extraEnv": [{"name": "1"}]}, "at '/extraEnv/0/name'"),
    ("disruption", {"podDisruptionBudget": {"maxUnavailable": 0}}, "at '/podDisruptionBudget"),
    ("api-ports", {"networkPolicy": {"apiServerPorts": []}}, "at '/networkPolicy/apiServerPorts'"),
    ("api-cidr", {"networkPolicy": {"apiServerCidrs": ["10.0.0.1"]}}, "apiServerCidrs/0'"),
    ("peer", {"networkPolicy": {"metricsFrom": [{}]}}, "at '/networkPolicy/metricsFrom/0'"),
    ("interval", {"serviceMonitor": {"interval": "30"}}, "at '/serviceMonitor/interval'"),
    ("runbook", {"prometheusRule": {"runbookUrl": "docs/x.md"}}, "at '/prometheusRule/runbookUrl'"),
    ("label", {"podLabels": {"a": 1}}, "at '/podLabels/a'"),
    ("extra", {"extraObjects": [1]}, "at '/extraObjects/0'"),
    ("gateway", {"gateway": {"enable": True}}, "additional properties 'enable' not allowed"),
    ("gateway-type", {"gateway": {"service": {"type": "External"}}}, "at '/gateway/service/type'"),
    ("gateway-grace", {"gateway": {"terminationGracePeriodSeconds": 5}}, "at '/gateway/termin"),
    ("gateway-peer", {"gateway": {"clients": [{}]}}, "at '/gateway/clients/0'"),
    (
        "gateway-latest",
        {"gateway": {"enabled": True, "image": {"tag": "latest"}}},
        "gateway.image.tag: got latest",
    ),
    ("name", {"fullnameOverride": "9-begins-with-a-digit"}, "at '/fullnameOverride'"),
]


@pytest.mark.parametrize(
    ("values", "message"), [pytest.param(v, m, id=name) for name, v, m in REJECTED]
)
def test_rejects_invalid_value(helm: Helm, values: dict[str, Any], message: str) -> None:
    assert message in helm.template_error(values)


def test_existing_service_account_requires_name(helm: Helm) -> None:
    error = helm.template_error({"serviceAccount": {"create": False}})
    assert "serviceAccount.name: missing" in error


def test_accepts_default_values_and_globals_of_a_parent_chart(helm: Helm) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert helm.template(values) == helm.template({})
    assert helm.template({"global": {"other": "chart's"}}) == helm.template({})
