"""The dashboard's queries run in a real Prometheus, which scrapes what the components export.

Needs `prometheus` on the PATH (Debian's package `prometheus`); `make test-alerts` fails without it,
other runs skip.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from faasmoe_up import free_port
from prometheus_client import CollectorRegistry

from faasmoe_operator.control.metrics import ControlPlaneMetrics
from faasmoe_operator.kube.metrics import OperatorMetrics
from faasmoe_operator.kube.types import MOEMODEL
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.metrics import EngineMetrics, render_metrics
from faasmoe_router.sequence_times import SequenceCounts, SequenceTimes
from faasmoe_router.tenants.metrics import TenantCollector
from faasmoe_router.tenants.usage import FunctionCost, RouterUsage

DASHBOARD = Path(__file__).parents[2] / "charts" / "faasmoe" / "dashboards" / "faasmoe.json"
BOARD = json.loads(DASHBOARD.read_text())
QUERIES = [
    (panel["title"], target["expr"])
    for panel in BOARD["panels"]
    for target in panel.get("targets", ())
]
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
START_TIMEOUT_S = 120.0


class Exporter:
    """A component's metrics; `work` is done before each scrape, so that rates are numbers."""

    def __init__(self, registry: CollectorRegistry, work: Callable[[], None]) -> None:
        self.registry = registry
        self.work = work


def router_exporter() -> Exporter:
    """A router that answers a traced request of the tenant acme."""
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, "tiny")
    link, dispatch, usage = ControlLinkMetrics(registry), DispatchMetrics(registry), RouterUsage(0)
    TenantCollector(usage, sequences=lambda: {"acme": (1, 0)}, n_keys=lambda: {"acme": 1}).register(
        registry
    )

    def work() -> None:
        metrics.record_finished("stop")
        metrics.record_prompt(5, 3)
        metrics.generation_tokens.inc(9)
        metrics.record_first_token(0.3, trace_id=TRACE_ID)
        metrics.inter_token_latency_s.observe(0.02)
        times = SequenceTimes(arrival_s=1.0, started_s=1.5, first_token_s=2.0, last_token_s=4.0)
        metrics.record_sequence(times, SequenceCounts(5, 3, 9), max_tokens=16, trace_id=TRACE_ID)
        link.cold_start_seconds.observe(0.2)
        dispatch.calls.inc(3)
        dispatch.layer_seconds.observe(0.001)
        usage.attribute_cost(FunctionCost(0.1, 0.01), {"acme": 14})

    return Exporter(registry, work)


def control_exporter() -> Exporter:
    """A control process that wakes a function."""
    metrics = ControlPlaneMetrics()
    metrics.functions.labels("Active").set(2)
    metrics.layer_replicas.labels(3).set(4)
    metrics.sandboxes.labels("Ready").set(1)
    return Exporter(metrics.registry, lambda: metrics.attach_seconds.observe(0.1))


def operator_exporter() -> Exporter:
    """An operator of one MoEModel that is ready."""
    metrics = OperatorMetrics()
    status = {"conditions": [{"type": "Ready", "status": "True", "reason": "Ready"}]}
    metrics.set_models([{"metadata": {"namespace": "a", "name": "tiny"}, "status": status}])

    def work() -> None:
        metrics.count_request("get", MOEMODEL, 200)
        metrics.reconcile_duration.observe(0.1)
        metrics.queue_duration.observe(0.1)

    return Exporter(metrics.registry, work)


TARGETS = {
    "router": (router_exporter, {"faasmoe_dev_model": "tiny"}),
    "control": (control_exporter, {"namespace": "default", "model": "tiny"}),
    "operator": (operator_exporter, {}),
}


@pytest.fixture(scope="module")
def exporters() -> Iterator[str]:
    """Serve each component's metrics at /NAME; yields the server's address."""
    components = {name: make() for name, (make, _) in TARGETS.items()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            component = components[self.path.strip("/")]
            component.work()
            accept = self.headers.get("Accept", "")
            body, content_type = render_metrics(component.registry, accept=accept)
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def prometheus(exporters: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus that has scraped all components at least twice."""
    program = shutil.which("prometheus")
    if program is None:
        assert "REQUIRE_PROMTOOL" not in os.environ, "prometheus is not on the PATH"
        pytest.skip("prometheus is not on the PATH")
    folder = tmp_path_factory.mktemp("prometheus")
    jobs = [
        {
            "job_name": name,
            "metrics_path": f"/{name}",
            "scrape_interval": "1s",
            "static_configs": [{"targets": [exporters], "labels": labels}],
        }
        for name, (_, labels) in TARGETS.items()
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": jobs}))
    address = f"127.0.0.1:{free_port()}"
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--enable-feature=exemplar-storage",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=60, trust_env=False) as client:
            wait_for_scrapes(client, process, folder / "log")
            yield client
    finally:
        process.terminate()
        process.wait()


def wait_for_scrapes(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        try:
            scrapes = query(client, "min_over_time(up[5m]) == 1 and count_over_time(up[5m]) >= 3")
        except httpx.TransportError:
            scrapes = []
        if len(scrapes) == len(TARGETS):
            return
        time.sleep(0.2)


def query(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    response = client.get("/api/v1/query", params={"query": expression})
    if response.status_code == 503:  # it starts
        return []
    assert response.status_code == 200, response.text
    return list(response.json()["data"]["result"])


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[t for t, _ in QUERIES])
def test_a_query_gives_numbers(prometheus: httpx.Client, title: str, expression: str) -> None:
    concrete = expression.replace("$__rate_interval", "1m").replace("$model", "tiny")
    values = [float(result["value"][1]) for result in query(prometheus, concrete)]
    assert any(map(math.isfinite, values)), f"{title}: {concrete}: {values}"


def test_the_models_to_choose_from_are_found(prometheus: httpx.Client) -> None:
    (variable,) = [v for v in BOARD["templating"]["list"] if v["type"] == "query"]
    match = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["definition"])
    assert match is not None
    response = prometheus.get(f"/api/v1/label/{match[2]}/values", params={"match[]": match[1]})
    assert response.json()["data"] == ["tiny"]


def test_exemplars_are_stored(prometheus: httpx.Client) -> None:
    names = "vllm:time_to_first_token_seconds_bucket"
    now_s = time.time()
    response = prometheus.get(
        "/api/v1/query_exemplars",
        params={"query": names, "start": now_s - 600, "end": now_s + 600},
    )
    found = [e["labels"]["trace_id"] for s in response.json()["data"] for e in s["exemplars"]]
    assert set(found) == {TRACE_ID}
