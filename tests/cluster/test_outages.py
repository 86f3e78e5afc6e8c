"""Outages of each kind raise their alerts: real components, real Prometheus, the chart's rules.

Needs `prometheus` on the PATH (Debian's package). Durations of the rules are shortened, see
`support/prometheus.py`; docs/kubernetes/troubleshooting.md has the table.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
from apiserver import ApiServer, Object, eventually
from chat_client import PROMPT
from fake_node import HOSTNAME, FakeNode
from helm import Helm
from moemodels import router_pods, wait_for_condition
from operator_process import OperatorProcess
from prometheus import Prometheus, fast_rules

pytestmark = pytest.mark.timeout(900)

CRITICAL = {"FaasmoeNoRouter", "FaasmoeOperatorDown", "FaasmoeActivationsFail"}
ALERT_S = 300.0
METRICS_PORT = 8001


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """Prometheus with the chart's rules."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not on the PATH")
    rules = fast_rules(Helm.from_package(tmp_path))
    with Prometheus.running(program, tmp_path, rules) as running:
        yield running


@pytest.fixture
def own_operator(api: ApiServer, service_account: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    """An operator that a test may kill."""
    process = OperatorProcess(api, tmp_path, service_account=service_account)
    process.start()
    yield process
    process.stop()


class Traffic:
    """Users of a router who do not give up: a new request every 0.2 s, whatever comes of it."""

    def __init__(self, address: str, **fields: Any) -> None:
        self._url = f"http://{address}:8000/v1/chat/completions"
        messages = [{"role": "user", "content": PROMPT}]
        self._body = {"model": "tiny", "messages": messages, "max_tokens": 8, **fields}
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=256)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def _run(self) -> None:
        while not self._stopped.wait(0.2):
            self._pool.submit(self._request)

    def _request(self) -> None:
        with httpx.Client(trust_env=False, timeout=60) as client:
            try:
                client.post(self._url, json=self._body)
            except httpx.TransportError:
                return  # the outage: nothing answers


def serve(
    api: ApiServer, operator: OperatorProcess, prometheus: Prometheus, model: Object
) -> Object:
    """Create a model, scrape it once it is ready, and return its router; no alert is critical."""
    namespace, name = (model["metadata"][field] for field in ("namespace", "name"))
    api.create("moemodels", model)
    wait_for_condition(api, namespace, name, "RouterReady", timeout_s=240)
    (router,) = eventually(lambda: router_pods(api, namespace, name), lambda pods: len(pods) == 1)
    prometheus.scrape(
        {
            operator.metrics_address: {},
            f"{router['status']['podIP']}:{METRICS_PORT}": {"faasmoe_dev_model": name},
        }
    )
    return router


def wait_for_alerts(prometheus: Prometheus, *alerts: str) -> None:
    """Wait until these alerts fire; fails with those that do."""
    eventually(prometheus.firing, lambda firing: firing.issuperset(alerts), timeout_s=ALERT_S)


def test_no_sandboxes(
    api: ApiServer,
    own_operator: OperatorProcess,
    namespace: str,
    tiny_model: Callable[..., Object],
    prometheus: Prometheus,
) -> None:
    model = tiny_model("tiny")
    model["spec"]["experts"]["template"] = {"nodeSelector": {"there-is": "no-such-node"}}
    router = serve(api, own_operator, prometheus, model)
    with Traffic(router["status"]["podIP"]):
        wait_for_alerts(
            prometheus, "FaasmoeRequestsRefused:activation_timed_out", "FaasmoeActivationsFail"
        )


def test_no_router(
    api: ApiServer,
    own_operator: OperatorProcess,
    namespace: str,
    tiny_model: Callable[..., Object],
    prometheus: Prometheus,
) -> None:
    router = serve(api, own_operator, prometheus, tiny_model("tiny"))
    scraped_s = own_operator.metric("faasmoe_operator_model_routers", state="ready")
    assert scraped_s == 1
    eventually(lambda: prometheus.firing() & CRITICAL, lambda firing: not firing)
    api.patch("nodes", "", HOSTNAME, {"spec": {"unschedulable": True}})
    try:
        api.delete("pods", namespace, router["metadata"]["name"])
        wait_for_alerts(prometheus, "FaasmoeNoRouter")
    finally:
        api.patch("nodes", "", HOSTNAME, {"spec": {"unschedulable": None}})
    eventually(prometheus.firing, lambda firing: "FaasmoeNoRouter" not in firing, timeout_s=ALERT_S)


def test_no_store(
    api: ApiServer,
    own_operator: OperatorProcess,
    node: FakeNode,
    namespace: str,
    tiny_model: Callable[..., Object],
    prometheus: Prometheus,
) -> None:
    router = serve(api, own_operator, prometheus, tiny_model("tiny"))
    claim = node.claim_folder(namespace, "tiny-store")
    (claim / "tiny").rename(claim / "gone")
    with Traffic(router["status"]["podIP"]):
        eventually(
            prometheus.firing,
            lambda firing: any(alert.startswith("FaasmoeRequestsRefused") for alert in firing),
            timeout_s=ALERT_S,
        )


def test_no_operator(
    api: ApiServer,
    own_operator: OperatorProcess,
    namespace: str,
    tiny_model: Callable[..., Object],
    prometheus: Prometheus,
) -> None:
    router = serve(api, own_operator, prometheus, tiny_model("tiny"))
    own_operator.kill()
    with Traffic(router["status"]["podIP"]):
        wait_for_alerts(
            prometheus, "FaasmoeOperatorDown", "FaasmoeRequestsRefused:activation_timed_out"
        )


def test_saturated(
    api: ApiServer,
    own_operator: OperatorProcess,
    namespace: str,
    tiny_model: Callable[..., Object],
    prometheus: Prometheus,
) -> None:
    router = {"maxNumSeqs": 1, "maxNumBatchedTokens": 16, "maxWaiting": 1}
    pod = serve(api, own_operator, prometheus, tiny_model("tiny", router=router))
    long_answers = {"max_tokens": 100, "ignore_eos": True}
    with (
        Traffic(pod["status"]["podIP"], **long_answers),
        Traffic(pod["status"]["podIP"], **long_answers),
    ):
        wait_for_alerts(prometheus, "FaasmoeRequestsShed")
