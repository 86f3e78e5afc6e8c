"""Alerts and dashboard panels use valid PromQL and only metrics that the components export."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import promql_parser
import pytest
import yaml
from helm import Helm
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from faasmoe_gateway.metrics import GatewayMetrics, GatewayState
from faasmoe_operator.control.metrics import ControlPlaneMetrics
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.types import Object
from faasmoe_router.api.refusals import refusal_counter
from faasmoe_router.control.metrics import ControlLinkMetrics as LinkMetrics
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.metrics import EngineMetrics
from faasmoe_router.tenants.metrics import TenantCollector
from faasmoe_router.tenants.usage import RouterUsage

CHART = Path(__file__).parents[2] / "charts" / "faasmoe"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
ALERTS = [a for file in CHART.glob("alerts/*.yaml") for a in yaml.safe_load(file.read_text())]
PANELS = [
    panel
    for panel in json.loads((CHART / "dashboards" / "faasmoe.json").read_text())["panels"]
    if panel["type"] != "row"
]
EXTERNAL_LABELS = {
    "faasmoe_router_": {"faasmoe_dev_model"},
    "vllm:": {"faasmoe_dev_model"},
    "faasmoe_tenant_": {"faasmoe_dev_model"},
    "faasmoe_control_": {"namespace", "model"},
}
"""Labels added by the targetLabels of the ServiceMonitor or by the operator's /metrics endpoint."""


def gateway() -> CollectorRegistry:
    """Return the registry of a gateway, whose gauges have samples."""
    registry = GatewayMetrics().registry
    registry.register(
        GatewayState(
            waiting=lambda: [("m", 0)],
            held_bytes=lambda: 0,
            connected=lambda: [("config", True)],
            lease_age_s=lambda: 0.0,
        )
    )
    return registry


def exported_metrics() -> dict[str, set[str]]:
    """Return the labels of every exported time series by name."""
    router = CollectorRegistry()
    EngineMetrics(router, "qwen").record_finished("stop")
    LinkMetrics(router)
    DispatchMetrics(router)
    refusal_counter(router)
    TenantCollector(RouterUsage(0.0), sequences=dict, n_keys=dict).register(router)
    exported: dict[str, set[str]] = {}
    registries = (router, OperatorMetrics().registry, ControlPlaneMetrics().registry, gateway())
    for registry in registries:
        for collector in list(registry._collector_to_names):
            for family in metric_families(collector):
                labels = set(getattr(collector, "_labelnames", getattr(family, "_labelnames", ())))
                labels |= next(
                    (EXTERNAL_LABELS[p] for p in EXTERNAL_LABELS if family.name.startswith(p)),
                    set(),
                )
                for suffix in SUFFIXES.get(family.type, ()):
                    extra = {"le"} if suffix == "_bucket" else set()
                    exported[f"{family.name}{suffix}"] = labels | extra
    return exported


def metric_families(collector: Collector) -> Iterable[Metric]:
    """Return the metric families of a collector; collects them if it cannot describe them."""
    describe = getattr(collector, "describe", collector.collect)
    return cast("Iterable[Metric]", describe())


EXPORTED = exported_metrics()


def selectors(node: Any) -> Iterator[Any]:
    """Yield the vector selectors of an expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    for child in (*children, *getattr(node, "args", ())):
        if child is not None:
            yield from selectors(child)


def check_expression(expression: str) -> int:
    """Check syntax, metric names and labels of a PromQL expression; return its selector count."""
    used_selectors = list(selectors(promql_parser.parse(expression)))
    for selector in used_selectors:
        assert selector.name in EXPORTED, f"{selector.name} is not exported"
        labels = EXPORTED[selector.name]
        used = {matcher.name for matcher in selector.matchers.matchers}
        assert used <= labels, f"{selector.name} has no label {used - labels}"
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    named = {label.strip() for group in grouped for label in group.split(",")}
    assert named <= set().union(*(EXPORTED[s.name] for s in used_selectors))
    return len(used_selectors)


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["name"] for alert in ALERTS])
def test_alert_uses_exported_metrics(alert: dict[str, Any]) -> None:
    assert check_expression(alert["expr"]) > 0


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_panel_uses_exported_metrics(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", "5m").replace("$model", "qwen")
        assert check_expression(query) > 0


def test_dashboard_shows_all_tenant_metrics() -> None:
    shown = {
        selector.name
        for panel in PANELS
        for target in panel["targets"]
        for selector in selectors(
            promql_parser.parse(target["expr"].replace("$__rate_interval", "5m"))
        )
    }
    tenant_metrics = {name for name in EXPORTED if name.startswith("faasmoe_tenant_")}
    assert tenant_metrics
    assert tenant_metrics <= shown


def test_check_rejects_unknown_metrics_and_labels() -> None:
    with pytest.raises(AssertionError, match="faasmoe_operator_nothing_total is not exported"):
        check_expression("sum(rate(faasmoe_operator_nothing_total[5m]))")
    with pytest.raises(AssertionError, match="has no label"):
        check_expression('faasmoe_operator_models{color="red"}')


def test_alerts_have_severity_summary_and_runbook(rendered: dict[str, list[Object]]) -> None:
    (rule,) = (o for o in rendered["everything"] if o["kind"] == "PrometheusRule")
    rules = [rule for group in rule["spec"]["groups"] for rule in group["rules"]]
    assert [r["alert"] for r in rules] == [
        a["name"]
        for name in ("operator", "models", "gateway")
        for a in ALERTS
        if a in load_alerts(name)
    ]
    for alert in rules:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert re.fullmatch(r"[0-9]+m", alert["for"])
        annotations = alert["annotations"]
        assert annotations["summary"].endswith(".")
        assert annotations["description"].endswith(".")
        url = f"https://wiki.example.com/faasmoe#{alert['alert'].lower()}"
        assert annotations["runbook_url"] == url


def test_alerts_have_no_runbook_link_by_default(helm: Helm) -> None:
    objects = helm.template({"prometheusRule": {"enabled": True}})
    (rule,) = (o for o in objects if o["kind"] == "PrometheusRule")
    alerts = [rule for group in rule["spec"]["groups"] for rule in group["rules"]]
    assert len(alerts) == len(ALERTS)
    assert {frozenset(rule["annotations"]) for rule in alerts} == {
        frozenset({"summary", "description"})
    }


def test_runbook_documents_every_alert() -> None:
    text = (CHART.parents[1] / "docs" / "kubernetes" / "troubleshooting.md").read_text()
    headings = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    assert {alert["name"] for alert in ALERTS} <= headings


def load_alerts(file: str) -> list[dict[str, Any]]:
    alerts: list[dict[str, Any]] = yaml.safe_load((CHART / "alerts" / f"{file}.yaml").read_text())
    return alerts


def test_config_map_contains_dashboard(rendered: dict[str, list[Object]]) -> None:
    (config_map,) = (
        obj
        for obj in rendered["everything"]
        if obj["kind"] == "ConfigMap" and obj["metadata"]["name"] == "our-moe-dashboard"
    )
    assert config_map["metadata"]["namespace"] == "monitoring"
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    original = json.loads((CHART / "dashboards" / "faasmoe.json").read_text())
    assert json.loads(config_map["data"]["faasmoe.json"]) == original


def test_panels_do_not_overlap_and_have_unique_titles() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        position = panel["gridPos"]
        cells = {
            (position["x"] + dx, position["y"] + dy)
            for dx in range(position["w"])
            for dy in range(position["h"])
        }
        assert position["x"] + position["w"] <= 24
        assert not cells & taken
        taken |= cells
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_service_monitor_selects_operator_service(
    rendered: dict[str, list[Object]],
) -> None:
    objects = rendered["everything"]
    (monitor,) = (obj for obj in objects if obj["kind"] == "ServiceMonitor")
    services = [obj for obj in objects if obj["kind"] == "Service"]
    selector = monitor["spec"]["selector"]["matchLabels"]
    (service,) = (s for s in services if s["metadata"]["labels"].items() >= selector.items())
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert endpoint["path"] == "/metrics"
    assert endpoint["honorLabels"] is True
