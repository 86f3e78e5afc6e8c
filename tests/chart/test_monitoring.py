"""Alerts and panels speak of metrics that there are, in PromQL that is one."""

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

from faasmoe_operator.control.metrics import ControlPlaneMetrics
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.types import Object
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
    "faasmoe_tenant_": {"faasmoe_dev_model"},
    "faasmoe_control_": {"namespace", "model"},
}
"""Labels that come later: from the ServiceMonitor's targetLabels, from the operator's front."""


def exported_metrics() -> dict[str, set[str]]:
    """Return the labels of every time series that the processes tell of, by its name."""
    router = CollectorRegistry()
    EngineMetrics(router, "qwen").record_finished("stop")
    LinkMetrics(router)
    DispatchMetrics(router)
    TenantCollector(RouterUsage(0.0), sequences=dict, n_keys=dict).register(router)
    found: dict[str, set[str]] = {}
    for registry in (router, OperatorMetrics().registry, ControlPlaneMetrics().registry):
        for collector in list(registry._collector_to_names):
            for family in metric_families(collector):
                labels = set(getattr(collector, "_labelnames", getattr(family, "_labelnames", ())))
                labels |= next(
                    (EXTERNAL_LABELS[p] for p in EXTERNAL_LABELS if family.name.startswith(p)),
                    set(),
                )
                for suffix in SUFFIXES.get(family.type, ()):
                    extra = {"le"} if suffix == "_bucket" else set()
                    found[f"{family.name}{suffix}"] = labels | extra
    return found


def metric_families(collector: Collector) -> Iterable[Metric]:
    """Return what a collector tells of; one that cannot say so without telling it tells it."""
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
    """Fail if an expression is none, or speaks of what nobody tells; return what it speaks of."""
    found = list(selectors(promql_parser.parse(expression)))
    for selector in found:
        assert selector.name in EXPORTED, f"{selector.name} is no metric"
        labels = EXPORTED[selector.name]
        used = {matcher.name for matcher in selector.matchers.matchers}
        assert used <= labels, f"{selector.name} has no label {used - labels}"
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    named = {label.strip() for group in grouped for label in group.split(",")}
    assert named <= set().union(*(EXPORTED[s.name] for s in found))
    return len(found)


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["name"] for alert in ALERTS])
def test_an_alert_speaks_of_metrics_that_there_are(alert: dict[str, Any]) -> None:
    assert check_expression(alert["expr"]) > 0


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_a_panel_speaks_of_metrics_that_there_are(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", "5m").replace("$model", "qwen")
        assert check_expression(query) > 0


def test_the_dashboard_shows_all_that_is_told_of_tenants() -> None:
    shown = {
        selector.name
        for panel in PANELS
        for target in panel["targets"]
        for selector in selectors(
            promql_parser.parse(target["expr"].replace("$__rate_interval", "5m"))
        )
    }
    told = {name for name in EXPORTED if name.startswith("faasmoe_tenant_")}
    assert told
    assert told <= shown


def test_a_metric_that_is_none_is_found_out() -> None:
    with pytest.raises(AssertionError, match="faasmoe_operator_nothing_total is no metric"):
        check_expression("sum(rate(faasmoe_operator_nothing_total[5m]))")
    with pytest.raises(AssertionError, match="has no label"):
        check_expression('faasmoe_operator_models{color="red"}')


def test_every_alert_says_how_bad_it_is_and_what_to_do(rendered: dict[str, list[Object]]) -> None:
    (rule,) = (o for o in rendered["everything"] if o["kind"] == "PrometheusRule")
    rules = [rule for group in rule["spec"]["groups"] for rule in group["rules"]]
    assert [r["alert"] for r in rules] == [
        a["name"] for name in ("operator", "models") for a in ALERTS if a in load_alerts(name)
    ]
    for made in rules:
        assert made["labels"]["severity"] in ("critical", "warning", "info")
        assert re.fullmatch(r"[0-9]+m", made["for"])
        notes = made["annotations"]
        assert notes["summary"].endswith(".")
        assert notes["description"].endswith(".")
        url = f"https://wiki.example.com/faasmoe#{made['alert'].lower()}"
        assert notes["runbook_url"] == url


def test_alerts_send_nobody_to_a_page_that_was_not_named(helm: Helm) -> None:
    objects = helm.template({"prometheusRule": {"enabled": True}})
    (rule,) = (o for o in objects if o["kind"] == "PrometheusRule")
    made = [rule for group in rule["spec"]["groups"] for rule in group["rules"]]
    assert len(made) == len(ALERTS)
    assert {frozenset(rule["annotations"]) for rule in made} == {
        frozenset({"summary", "description"})
    }


def test_every_alert_has_its_paragraph_where_the_runbook_is_written() -> None:
    text = (CHART.parents[1] / "docs" / "kubernetes" / "troubleshooting.md").read_text()
    headings = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    assert {alert["name"] for alert in ALERTS} <= headings


def load_alerts(file: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((CHART / "alerts" / f"{file}.yaml").read_text())
    return found


def test_the_dashboard_comes_as_it_is(rendered: dict[str, list[Object]]) -> None:
    (found,) = (
        obj
        for obj in rendered["everything"]
        if obj["kind"] == "ConfigMap" and obj["metadata"]["name"] == "our-moe-dashboard"
    )
    assert found["metadata"]["namespace"] == "monitoring"
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    original = json.loads((CHART / "dashboards" / "faasmoe.json").read_text())
    assert json.loads(found["data"]["faasmoe.json"]) == original


def test_panels_lie_side_by_side_and_have_a_title_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_the_operators_metrics_are_scraped_by_its_service(
    rendered: dict[str, list[Object]],
) -> None:
    objects = rendered["everything"]
    (monitor,) = (obj for obj in objects if obj["kind"] == "ServiceMonitor")
    (service,) = (obj for obj in objects if obj["kind"] == "Service")
    selector = monitor["spec"]["selector"]["matchLabels"]
    assert service["metadata"]["labels"].items() >= selector.items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert endpoint["path"] == "/metrics"
    assert endpoint["honorLabels"] is True
