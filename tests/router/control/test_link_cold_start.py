"""Routers whose functions are at zero, or lose their addresses while requests run."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fake_control import FakeControl

from faasmoe_contracts.routing_table import RoutingTable
from faasmoe_router.api import completions, streaming
from faasmoe_router.engine.tokenizer import ModelTokenizer

HEADER = "X-FaaSMoE-Cold-Start"
Addresses = dict[str, list[str]]
Greedy = Callable[[tuple[int, ...], int], list[int]]
Until = Callable[[Callable[[], bool]], None]


@pytest.fixture
def text_of(model_tokenizer: ModelTokenizer, greedy: Greedy) -> Callable[[int], str]:
    """Returns the greedy completion of "the quick" by the in-process model."""

    def generate(max_tokens: int) -> str:
        ids = greedy(tuple(model_tokenizer.encode("the quick")), max_tokens)
        detokenizer = model_tokenizer.new_detokenizer()
        return "".join(map(detokenizer.feed, ids)) + detokenizer.flush()

    return generate


def activate_with(control: FakeControl, warm: Addresses) -> None:
    def activate(names: list[str]) -> None:
        control.set_addresses({name: warm[name] for name in names})

    control.on_activation = activate


def test_a_burst_at_zero_sends_one_activation_request_and_is_served(
    router: Any,
    control: FakeControl,
    warm: Addresses,
    text_of: Callable[[int], str],
    until: Until,
) -> None:
    may_activate = threading.Event()

    def activate(names: list[str]) -> None:
        may_activate.wait(120)
        control.set_addresses({name: warm[name] for name in names})

    control.on_activation = activate
    with router(repeat_s=60.0) as r, ThreadPoolExecutor(32) as pool:
        until(lambda: r.metric("control_connected") == 1)
        answers = [pool.submit(r.complete) for _ in range(32)]
        until(lambda: r.metric("queued_requests") == 32)
        may_activate.set()
        assert {a.result().json()["choices"][0]["text"] for a in answers} == {text_of(8)}
        assert all(float(a.result().headers[HEADER]) > 0 for a in answers)
        assert control.activation_requests == [
            list(warm)
        ]  # in the order of the table: first layers first
        assert r.metric("activation_requests_total") == 1
        assert r.metric("local_computations_total") == 0
        assert r.metric("cold_start_seconds_count") == 32


def test_only_requests_that_waited_have_the_cold_start_header(
    router: Any, control: FakeControl, warm: Addresses, until: Until
) -> None:
    activate_with(control, warm)
    with router() as r:
        assert float(r.complete().headers[HEADER]) >= 0
        assert HEADER not in r.complete().headers
        control.set_addresses({next(iter(warm)): []})
        until(lambda: r.metric("routing_table_version") == control.table.version)
        with stream(r) as response:
            assert float(response.headers[HEADER]) >= 0
            assert response.read().endswith(b"[DONE]\n\n")
        with stream(r) as response:
            assert HEADER not in response.headers


def test_requests_are_rejected_when_the_model_is_not_activated_in_time(
    router: Any, control: FakeControl
) -> None:
    with router(timeout_s=0.5, repeat_s=0.2) as r:
        started_s = time.monotonic()
        answer = r.complete(stream=True)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["type"] == "server_error"
        assert "0.5 s" in answer.json()["error"]["message"]
        assert HEADER not in answer.headers
        n_repeated = (time.monotonic() - started_s) / 0.2
        assert 1 <= len(control.activation_requests) <= 2 + n_repeated
        assert r.metric("queued_requests") == 0


def test_a_function_that_is_not_activated_is_computed_locally_without_further_waits(
    router: Any,
    control: FakeControl,
    warm: Addresses,
    text_of: Callable[[int], str],
    until: Until,
) -> None:
    lost, *others = warm
    control.set_addresses({name: warm[name] for name in others})
    with router(timeout_s=0.5, call_queue_timeout_s=0.1) as r:
        until(lambda: r.metric("control_connected") == 1)
        answer = r.complete(max_tokens=40)
        assert answer.json()["choices"][0]["text"] == text_of(40)
        assert float(answer.headers[HEADER]) >= 0.5
        assert r.metric("local_computations_total") > 0
        assert (
            r.metric("local_fallback_functions") == r.metric("local_fallback_admissions_total") == 1
        )
        assert HEADER not in r.complete().headers
        control.set_addresses({lost: warm[lost]})
        until(lambda: r.metric("local_fallback_functions") == 0)
        n_local = r.metric("local_computations_total")
        assert HEADER not in r.complete().headers
        assert r.metric("local_computations_total") == n_local
        assert control.activation_requests
        assert {name for names in control.activation_requests for name in names} == {lost}


def test_requests_are_rejected_when_half_of_the_model_is_not_activated(
    router: Any, control: FakeControl, warm: Addresses, until: Until
) -> None:
    control.set_addresses({name: warm[name] for name in list(warm)[2:]})
    with router(timeout_s=0.2) as r:
        until(lambda: r.metric("control_connected") == 1)
        answer = r.complete()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "service_unavailable"
        assert r.metric("local_fallback_functions") == r.metric("local_computations_total") == 0


def test_half_of_the_model_is_computed_in_the_router_where_memory_is_limited(
    router: Any,
    control: FakeControl,
    warm: Addresses,
    text_of: Callable[[int], str],
    until: Until,
) -> None:
    n_half = len(warm) // 2
    control.set_addresses({name: warm[name] for name in list(warm)[n_half:]})
    with router(computes_overflow=True) as r:
        until(lambda: r.metric("control_connected") == 1)
        answer = r.complete(max_tokens=40)
        assert answer.json()["choices"][0]["text"] == text_of(40)
        assert HEADER not in answer.headers
        assert r.metric("colocated_computations_total") > 0
        assert r.metric("local_computations_total") == 0
        assert not control.activation_requests


def test_a_full_activation_queue_rejects_with_status_429(
    router: Any, control: FakeControl, warm: Addresses, until: Until
) -> None:
    with router(max_requests=2) as r, ThreadPoolExecutor(2) as pool:
        queued = [pool.submit(r.complete) for _ in range(2)]
        until(lambda: r.metric("queued_requests") == 2)
        refused = r.complete()
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        control.set_addresses(warm)
        assert [h.result().status_code for h in queued] == [200, 200]


def test_a_disconnected_client_leaves_the_activation_queue(
    router: Any, control: FakeControl, until: Until
) -> None:
    with router(max_requests=1) as r:
        with pytest.raises(httpx.ReadTimeout):
            r.http.post("/v1/completions", json={"model": "tiny", "prompt": "a"}, timeout=0.3)
        until(lambda: r.metric("queued_requests") == 0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams send a comment every 0.05 s without an event."""
    for module in (completions, streaming):
        monkeypatch.setattr(module, "KEEPALIVE_S", 0.05)


@pytest.mark.usefixtures("impatient")
def test_a_queued_stream_sends_comments_and_then_its_events(
    router: Any, control: FakeControl, warm: Addresses, text_of: Callable[[int], str]
) -> None:
    with router() as r, stream(r, max_tokens=8) as response:
        lines = response.iter_lines()
        assert next(lines) == ": waiting"
        control.set_addresses(warm)
        events = [line for line in lines if line.startswith("data:")]
        assert events[-1] == "data: [DONE]"
        assert text_of_events(events) == text_of(8)


@pytest.mark.usefixtures("impatient")
def test_a_queued_stream_ends_with_the_error_that_a_response_would_have(router: Any) -> None:
    with router(timeout_s=1.0) as r, stream(r) as response:
        *_, last = (line for line in response.iter_lines() if line.startswith("data:"))
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "service_unavailable"


@pytest.mark.usefixtures("impatient")
def test_a_disconnected_stream_leaves_the_activation_queue(router: Any, until: Until) -> None:
    with router(max_requests=1) as r:
        with stream(r) as response:
            lines = response.iter_lines()
            assert next(lines) == ": waiting"
            assert r.metric("queued_requests") == 1
        until(lambda: r.metric("queued_requests") == 0)


def test_shutdown_rejects_queued_requests(router: Any, until: Until) -> None:
    with router() as r, ThreadPoolExecutor(1) as pool:
        queued = pool.submit(r.complete)
        until(lambda: r.metric("queued_requests") == 1)
        r.server.should_exit = True
        assert queued.result().status_code == 503
        assert "server is shutting down" in queued.result().json()["error"]["message"]


def test_a_router_without_a_table_is_not_ready_and_queues_requests(
    router: Any, control: FakeControl, warm: Addresses, until: Until
) -> None:
    control.table_status = 503
    with router() as r, ThreadPoolExecutor(1) as pool:
        assert r.http.get("/health").status_code == 503
        queued = pool.submit(r.complete)
        until(lambda: r.metric("queued_requests") == 1)
        assert control.activation_requests == []
        control.set_addresses(warm)
        control.table_status = 0
        assert queued.result().status_code == 200
        assert r.http.get("/health").status_code == 200


def test_serves_while_the_control_process_is_unreachable(
    router: Any, control: FakeControl, warm: Addresses, until: Until
) -> None:
    control.set_addresses(warm)
    with router() as r:
        until(lambda: r.metric("control_connected") == 1)
        with stream(r, max_tokens=64) as response:
            lines = response.iter_lines()
            next(lines)
            control.stop()
            *_, last = (line for line in lines if line)
            assert last == "data: [DONE]"
        until(lambda: r.metric("control_connected") == 0)
        answer = r.complete()
        assert answer.status_code == 200
        assert HEADER not in answer.headers
        assert r.metric("local_computations_total") == 0
        control.start()
        until(lambda: r.metric("control_connected") == 1)


def test_a_missing_function_is_unavailable_while_the_control_process_is_unreachable(
    router: Any, control: FakeControl, until: Until
) -> None:
    with router(timeout_s=0.5) as r:
        until(lambda: r.metric("control_connected") == 1)
        control.stop()
        until(lambda: r.metric("control_connected") == 0)
        assert r.complete().status_code == 503


def test_requests_queued_during_a_restart_of_the_control_process_are_served(
    router: Any, control: FakeControl, warm: Addresses, until: Until
) -> None:
    with router() as r, ThreadPoolExecutor(1) as pool:
        until(lambda: r.metric("control_connected") == 1)
        control.stop()
        queued = pool.submit(r.complete)
        until(lambda: r.metric("queued_requests") == 1)
        control.epoch = "second"
        activate_with(control, warm)
        control.start()
        assert queued.result().status_code == 200


def stream(r: Any, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "the quick", "temperature": 0, "stream": True} | fields
    return r.http.stream("POST", "/v1/completions", json=body)


def text_of_events(lines: Any) -> str:
    events = [json.loads(x.removeprefix("data: ")) for x in lines if x and "[DONE]" not in x]
    return "".join(event["choices"][0]["text"] for event in events)


def test_a_function_that_loses_its_address_is_requested_and_then_computed_locally(
    router: Any,
    control: FakeControl,
    warm: Addresses,
    text_of: Callable[[int], str],
    until: Until,
) -> None:
    control.set_addresses(warm)
    lost = list(warm)[:3]
    with router(call_queue_timeout_s=0.3, replacement_timeout_s=0.3) as r:
        until(lambda: r.metric("control_connected") == 1)
        with stream(r, max_tokens=100) as response:
            lines = response.iter_lines()
            first = next(lines)
            control.set_addresses(dict.fromkeys(lost, ()))
            text = text_of_events([first, *lines])
        assert text == text_of(100)
        assert r.metric("local_computations_total") > 0
        assert r.metric("queued_calls") == 0
        assert control.activation_requests
        # All missing functions together, whichever layer needed them first.
        assert sorted(control.activation_requests[0]) == sorted(lost)
        until(lambda: any(load["local"] > 0 for load in control.load_reports))
        until(lambda: any(load["held"] > 0 for load in control.load_reports))


def test_a_function_that_gets_a_new_address_is_called_again(
    router: Any,
    control: FakeControl,
    warm: Addresses,
    text_of: Callable[[int], str],
    until: Until,
) -> None:
    control.set_addresses(warm)
    activate_with(control, warm)
    with router(call_queue_timeout_s=20.0, replacement_timeout_s=20.0) as r:
        until(lambda: r.metric("control_connected") == 1)
        with stream(r, max_tokens=100) as response:
            lines = response.iter_lines()
            first = next(lines)
            control.set_addresses(dict.fromkeys(warm, ()))
            text = text_of_events([first, *lines])
        assert text == text_of(100)
        assert r.metric("local_computations_total") == 0
        assert sorted(control.activation_requests[0]) == sorted(warm)


def test_load_is_reported_by_function(
    router: Any, control: FakeControl, warm: Addresses, cold_table: RoutingTable, until: Until
) -> None:
    activate_with(control, warm)
    started_s = time.monotonic()
    with router() as r:
        r.complete(max_tokens=4)

        def reported(key: str) -> int:
            return sum(f[key] for load in control.load_reports for f in load["functions"].values())

        until(lambda: reported("calls") == r.metric("function_calls_total") > 0)
        assert reported("rows") >= reported("calls")
        names = {name for load in control.load_reports for name in load["functions"]}
        assert names <= {entry.spec.id for entry in cold_table.functions}
        until(lambda: not control.load_reports[-1]["functions"])  # idle
        *_, report = reports = list(control.load_reports)
        elapsed_s = time.monotonic() - started_s
        assert report["router"] == "router"
        assert all(load["interval_s"] > 0 for load in reports)
        assert sum(load["interval_s"] for load in reports) <= elapsed_s  # of each what it covers
        assert {"sent_at_s", "held", "local"} <= report.keys()
