import asyncio
import json
import logging
import sys

import aiohttp
import pytest
from aiohttp import web
from kube_objects import make_object

from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.operator import JsonFormatter
from faasmoe_operator.kube.server import HealthRoutes, Readiness, start_server
from faasmoe_operator.kube.types import MOEMODEL, POD


async def fetch_endpoints(
    readiness: Readiness, metrics: OperatorMetrics
) -> dict[str, tuple[int, str]]:
    app = web.Application()
    health = HealthRoutes(readiness, metrics.text)
    app.add_routes([*health.routes(), *health.metrics_routes()])
    runner = await start_server(app, host="127.0.0.1", port=0)
    try:
        host, port = runner.addresses[0][:2]
        found = {}
        async with aiohttp.ClientSession(f"http://{host}:{port}") as http:
            for path in ("/healthz", "/readyz", "/metrics"):
                async with http.get(path) as response:
                    found[path] = response.status, await response.text()
        return found
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("waits_for", "status"), [("", 200), ("the CRD of moemodels.faasmoe.dev", 503)]
)
def test_readyz_reports_what_the_operator_waits_for(waits_for: str, status: int) -> None:
    found = asyncio.run(fetch_endpoints(Readiness(waits_for), OperatorMetrics()))
    assert found["/healthz"][0] == 200
    assert found["/readyz"][0] == status
    assert json.loads(found["/readyz"][1]).get("waits_for", "") == waits_for


def test_metrics_are_no_part_of_the_health_checks() -> None:
    """They may have a port of their own, while probes and routers use that of the control API."""
    health = HealthRoutes(Readiness(""), OperatorMetrics().text)
    assert {route.path for route in health.routes()} == {"/healthz", "/readyz"}
    assert {route.path for route in health.metrics_routes()} == {"/metrics"}


def test_routers_of_a_model_are_counted_once_its_store_is_prepared() -> None:
    metrics = OperatorMetrics()
    preparing = make_object(MOEMODEL, "new", spec={"router": {"replicas": 1}})
    serving = make_object(MOEMODEL, "qwen", spec={"router": {"replicas": 3}})
    serving["status"] = {"router": {"replicas": 3, "readyReplicas": 2}}
    off = make_object(MOEMODEL, "off", spec={"suspend": True, "router": {"replicas": 3}})
    off["status"] = {"router": {"replicas": 0}}
    metrics.set_models([preparing, serving, off])
    samples = {
        (sample.labels["model"], sample.labels["state"]): sample.value
        for family in metrics.model_routers.collect()
        for sample in family.samples
    }
    assert samples == {
        ("qwen", "desired"): 3,
        ("qwen", "ready"): 2,
        ("off", "desired"): 0,
        ("off", "ready"): 0,
    }


def test_serves_metrics() -> None:
    metrics = OperatorMetrics()
    metrics.count_request("apply", POD, 200)
    ready = make_object(MOEMODEL, "a")
    ready["status"] = {"conditions": [{"type": "Ready", "status": "True", "reason": "Ready"}]}
    metrics.set_models([ready, make_object(MOEMODEL, "b")])
    text = asyncio.run(fetch_endpoints(Readiness(""), metrics))["/metrics"][1]
    count = 'faasmoe_operator_api_requests_total{code="200",kind="pods",verb="apply"} 1.0'
    assert count in text
    assert 'faasmoe_operator_models{ready="True",reason="Ready"} 1.0' in text
    assert 'faasmoe_operator_models{ready="Unknown",reason="NotReconciled"} 1.0' in text


def test_a_json_log_line_is_one_object() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord(
            "faasmoe", logging.WARNING, "x.py", 1, "it is %s\nso", ("so",), sys.exc_info()
        )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["level"], entry["logger"]) == ("WARNING", "faasmoe")
    assert entry["message"] == "it is so\nso"
    assert "ValueError: why" in entry["exception"]
