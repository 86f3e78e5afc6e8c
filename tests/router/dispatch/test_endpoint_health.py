"""Replicas that hang, slow down, die or respond wrongly: nothing is lost, and little time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_waits import Stopwatch
from raw_http import stopped, wait_until
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.cold_start import ActivationSettings
from faasmoe_router.dispatch.endpoint_health import (
    OutlierDetectionSettings,
    ResilienceSettings,
)
from faasmoe_router.dispatch.fanout import DispatchTimeouts
from faasmoe_router.dispatch.latency_tracker import MIN_SAMPLES
from faasmoe_router.dispatch.metrics import DispatchMetrics

DEADLINE_S = 120.0
GRACE_S = 5.0  # for a busy machine, beside the waits for a core
LATE_S = 0.01  # many times a call's latency
HUNG_S = 200.0  # longer than any wait under test
SLOW_S = 0.4
# Calls that a busy machine delays are not abandoned, unless a test is about that.
PATIENT = ResilienceSettings(
    abandon_min_s=HUNG_S,
    abandon_default_s=HUNG_S,
    outlier_detection=OutlierDetectionSettings(base_ejection_time_s=0.1, max_ejection_time_s=0.2),
)
Addresses = dict[str, tuple[str, ...]]


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


@pytest.fixture(scope="module", params=["http", "mailbox"])
def socket_dir(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path | None:
    """Folder of the sandboxes' Unix sockets, so that mailboxes are used; None for HTTP only."""
    return tmp_path_factory.mktemp("s") if request.param == "mailbox" else None


@pytest.fixture(scope="module")
def sandbox_server(
    sandbox: StartSandbox, store: Store, socket_dir: Path | None
) -> Iterator[SandboxProcess]:
    with sandbox(capacity=64, socket_dir=socket_dir or "") as process:
        process.attach_blocks(store, 8)
        yield process


@pytest.fixture
def other(sandbox: StartSandbox, store: Store, socket_dir: Path | None) -> Iterator[SandboxProcess]:
    with sandbox(capacity=64, socket_dir=socket_dir or "") as process:
        process.attach_blocks(store, 8)
        yield process


@pytest.fixture
def table(sandbox_server: SandboxProcess, store: Store) -> RoutingTable:
    return sandbox_server.attach_blocks(store, 8)


class Layer:
    """The first layer, computed by a dispatcher with these addresses."""

    def __init__(
        self,
        store: Store,
        table: RoutingTable,
        addresses: Sequence[str],
        *,
        socket_dir: Path | None,
        activation: ActivationSettings | None = None,
        **changes: Any,
    ) -> None:
        self.metrics = DispatchMetrics()
        self.dispatcher = Dispatcher(
            store,
            with_addresses(table, *addresses),
            metrics=self.metrics,
            timeouts=DispatchTimeouts(DEADLINE_S, HUNG_S, HUNG_S),
            activation=activation,
            resilience=replace(PATIENT, **changes),
            socket_dir=socket_dir,
        )
        if socket_dir is not None:
            wait_for_mailboxes(self.dispatcher, addresses, socket_dir)
        generator = torch.Generator().manual_seed(0)
        layer = store.manifest.layers[0]
        self.hidden = torch.randn(1, layer.hidden_size, generator=generator)  # [T, H]
        scores = torch.rand(1, layer.num_experts, generator=generator)  # [T, E]
        self.weights, self.index = scores.topk(layer.top_k)  # [T, k]
        self.expected = self.compute()

    def compute(self) -> torch.Tensor:
        return self.dispatcher.compute(0, self.hidden, self.index, self.weights)

    def check(self, n_times: int = 1) -> float:
        """Compute and compare `n_times`; return the longest time."""
        times_s = []
        for _ in range(n_times):
            stopwatch = Stopwatch()
            torch.testing.assert_close(self.compute(), self.expected)
            times_s.append(stopwatch.elapsed_s())
        return max(times_s)

    def count(self, name: str) -> float:
        if self.dispatcher.native is not None:
            self.dispatcher.native.settle_before(1)  # of a pass whose other layers do not follow
        return read_metric(self.metrics, name)


@pytest.fixture
def layer(
    store: Store, table: RoutingTable, socket_dir: Path | None
) -> Iterator[Callable[..., Layer]]:
    made: list[Layer] = []

    def make(*addresses: str, **changes: Any) -> Layer:
        made.append(Layer(store, table, addresses, socket_dir=socket_dir, **changes))
        return made[-1]

    yield make
    for one in made:
        one.dispatcher.close()


def wait_for_mailboxes(dispatcher: Dispatcher, addresses: Sequence[str], socket_dir: Path) -> None:
    """Wait for the mailboxes of sandboxes; scripted servers have none."""
    assert dispatcher.native is not None
    served = [a for a in addresses if (socket_dir / f"{a.rpartition(':')[2]}.sock").exists()]
    assert dispatcher.native.connector.wait_until_open(served, DEADLINE_S)


def with_addresses(table: RoutingTable, *addresses: str) -> RoutingTable:
    entries = tuple(FunctionEndpoints(e.spec, addresses) for e in table.functions)
    return replace(table, functions=entries)


def read_metric(metrics: DispatchMetrics, name: str) -> float:
    return float(getattr(metrics, name).collect()[0].samples[0].value)


def test_slow_call_is_computed_at_another_replica(
    layer: Callable[..., Layer],
    sandbox_server: SandboxProcess,
    other: SandboxProcess,
    socket_dir: Path | None,
) -> None:
    one = layer(sandbox_server.address, other.address)
    one.check(2 * MIN_SAMPLES)
    n_hedges = one.count("hedges")
    with stopped(other):
        elapsed_s = one.check(4)
    assert elapsed_s < GRACE_S < HUNG_S
    if socket_dir is None:  # a mailbox's caller sees that the process is stopped, without a hedge
        assert one.count("hedges") > n_hedges
    assert one.count("local") == 0


def test_hedges_are_bounded_by_the_retry_budget(
    layer: Callable[..., Layer], serve: Callable[..., Any], sandbox_server: SandboxProcess
) -> None:
    """Half of the calls go to a replica that is always slow; few calls are hedged."""

    def respond_late(connection: socket.socket) -> None:
        host, port = sandbox_server.address.split(":")
        with socket.create_connection((host, int(port))) as upstream:
            while request := connection.recv(1 << 20):
                upstream.sendall(request)
                response = upstream.recv(1 << 20)
                time.sleep(LATE_S)
                connection.sendall(response)

    one = layer(
        *(sandbox_server.address, serve(respond_late).address),
        hedge_min_s=0.0,
        hedge_quantile=0.01,
        # The slow replica must not be ejected.
        outlier_detection=OutlierDetectionSettings(consecutive_lost_hedges=10**6),
    )
    one.check(300)
    n_allowed = 0.05 * one.count("calls") + PATIENT.retry_budget_burst
    assert PATIENT.retry_budget_burst < one.count("hedges") <= n_allowed


def test_hung_sandbox_is_ejected_quickly_and_returns_when_it_resumes(
    layer: Callable[..., Layer], other: SandboxProcess
) -> None:
    one = layer(
        other.address,
        abandon_min_s=SLOW_S,
        abandon_default_s=SLOW_S,
        outlier_detection=OutlierDetectionSettings(base_ejection_time_s=5.0),  # no probe at once
    )
    one.check(2 * MIN_SAMPLES)
    n_local = one.count("local")
    with stopped(other):
        assert one.check(2) < SLOW_S + GRACE_S
        assert one.count("ejected") == 1
        calls = one.count("calls")
        one.check(20)
        assert one.count("calls") == calls
        assert one.count("local") == n_local + 22

    def responds() -> bool:
        n_local = one.count("local")
        one.check(5)
        return one.count("ejected") == 0 and one.count("local") == n_local

    wait_until(responds)


def test_dead_replica_is_tried_once_and_then_ejected(
    layer: Callable[..., Layer], sandbox_server: SandboxProcess, other: SandboxProcess,
    socket_dir: Path | None,
) -> None:  # fmt: skip
    one = layer(sandbox_server.address, other.address)
    one.check(4)
    other.process.kill()
    other.process.wait()
    assert one.check(20) < GRACE_S
    assert one.count("failed_calls") == 1
    assert one.count("retries") == (socket_dir is None)  # else the layer is computed again
    assert one.count("ejected") == 1
    assert one.count("local") == 0


def test_calls_wait_for_the_replacement_of_a_dead_replica(
    layer: Callable[..., Layer], store: Store, table: RoutingTable, sandbox_server: SandboxProcess,
    other: SandboxProcess,
) -> None:  # fmt: skip
    """All calls to the dead replica share one wait."""
    activation = ActivationSettings(
        lambda _: None, timeout_s=DEADLINE_S, replacement_timeout_s=DEADLINE_S
    )
    one = layer(other.address, activation=activation)
    one.check(2)
    other.process.kill()
    other.process.wait()
    replacement = threading.Timer(0.1, one.dispatcher.replace_table, [replace(table, version=2)])
    replacement.start()
    one.check(3)
    replacement.join()
    assert one.count("local") == 0


def test_calls_to_a_dead_sandbox_without_replacement_are_computed_locally_after_one_wait(
    layer: Callable[..., Layer], other: SandboxProcess, activation_waits: Any
) -> None:
    activation = ActivationSettings(lambda _: None, timeout_s=DEADLINE_S, replacement_timeout_s=0.3)
    one = layer(other.address, activation=activation)
    one.check(2)
    other.process.kill()
    other.process.wait()
    activation_waits.requested_s = 0.0
    one.check(10)
    assert 0 < activation_waits.requested_s < 0.3 * 3  # if each call waited: 0.3 * 10
    assert one.count("local") == 10


def test_function_that_lost_its_last_address_is_computed_soon(
    layer: Callable[..., Layer], table: RoutingTable, other: SandboxProcess
) -> None:
    """A dead sandbox may leave the table before the calls notice."""
    activation = ActivationSettings(lambda _: None, timeout_s=HUNG_S)
    one = layer(other.address, activation=activation)
    one.check(2)
    one.dispatcher.replace_table(replace(with_addresses(table), version=2))
    assert one.check(10) < GRACE_S
    assert one.count("local") == 10


@pytest.mark.parametrize("n_hung", [1, 2])
def test_hung_sandboxes_cost_little_without_a_budget(
    layer: Callable[..., Layer], sandbox_server: SandboxProcess, other: SandboxProcess, n_hung: int
) -> None:
    """However many hang: they are found out by probes, and ejected."""
    hung = [other, sandbox_server][:n_hung]
    one = layer(
        *(process.address for process in hung),
        abandon_min_s=SLOW_S,
        abandon_default_s=SLOW_S,
        retry_budget_ratio=0.0,
        retry_budget_burst=0.0,
    )
    one.check(2)
    with ExitStack() as stack:
        for process in hung:
            stack.enter_context(stopped(process))
        started_s = time.monotonic()
        while one.count("ejected") < n_hung:
            one.check()
            assert time.monotonic() - started_s < HUNG_S, "not all are ejected"
        n_local = one.count("local")
        one.check(20)
        assert one.count("local") == n_local + 20


def test_errors_eject_and_overload_does_not(
    layer: Callable[..., Layer],
    serve: Callable[..., Any],
    sandbox_server: SandboxProcess,
) -> None:
    def respond_with(status: str) -> Callable[[socket.socket], None]:
        def behave(connection: socket.socket) -> None:
            while connection.recv(1 << 20):
                connection.sendall(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode())

        return behave

    for status, is_ejected in (("500 Fault", True), ("200 OK", True), ("429 Busy", False)):
        bad = serve(respond_with(status))
        # Not probed during the test: a server that responds 200 to everything would return.
        one = layer(
            sandbox_server.address,
            bad.address,
            outlier_detection=OutlierDetectionSettings(
                base_ejection_time_s=60.0, max_ejection_time_s=60.0
            ),
        )
        one.check(20)
        assert one.count("ejected") == is_ejected, status
        assert one.count("local") == 0
        assert one.count("failed_calls") == (3 if is_ejected else one.count("retries"))


@pytest.mark.parametrize("timeouts", [(2.0, 1.0, 3.0), (1.0, 3.0, 2.0), (0.0, 1.0, 2.0)], ids=str)
def test_timeouts_that_do_not_nest_are_refused(timeouts: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="each at most the next"):
        DispatchTimeouts(*timeouts)


def test_layer_is_computed_locally_after_its_deadline(
    store: Store, table: RoutingTable, serve: Callable[..., Any]
) -> None:
    def never_respond(connection: socket.socket) -> None:
        while connection.recv(1 << 20):
            pass

    metrics = DispatchMetrics()
    activation = ActivationSettings(
        lambda _: None, timeout_s=DEADLINE_S, replacement_timeout_s=DEADLINE_S
    )
    dispatcher = Dispatcher(
        store,
        with_addresses(table, serve(never_respond).address, serve(never_respond).address),
        metrics=metrics,
        timeouts=DispatchTimeouts(0.1, 0.3, 0.5),
        activation=activation,
        resilience=replace(PATIENT, abandon_default_s=DEADLINE_S),
    )
    layer = store.manifest.layers[0]
    hidden, index = torch.ones(1, layer.hidden_size), torch.zeros(1, 1, dtype=torch.int64)
    stopwatch, started_s = Stopwatch(), time.monotonic()
    dispatcher.compute(0, hidden, index, torch.ones(1, 1))
    assert time.monotonic() - started_s > 0.4
    assert stopwatch.elapsed_s() < 0.5 + GRACE_S
    assert read_metric(metrics, "local") == 1
    dispatcher.close()
