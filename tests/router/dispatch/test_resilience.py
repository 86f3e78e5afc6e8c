"""Replicas that hang, are slow, die or lie: nothing is lost, and little time."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.calls import DispatchTimeouts
from faasmoe_router.dispatch.cold_start import ActivationSettings
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.outlier_detection import OutlierDetectionSettings
from faasmoe_router.dispatch.resilience import MIN_SAMPLES, ResilienceSettings

DEADLINE_S = 20.0
GRACE_S = 5.0  # of a busy machine
LATE_S = 0.01  # many times what a call takes
HUNG_S = 15.0  # longer than anything that is to be waited for
SLOW_S = 0.4
# What a busy machine keeps waiting is not given up, unless a test is about that.
PATIENT = ResilienceSettings(
    abandon_min_s=HUNG_S,
    abandon_default_s=HUNG_S,
    outlier_detection=OutlierDetectionSettings(base_ejection_time_s=0.1, max_ejection_time_s=0.2),
)
Addresses = dict[str, tuple[str, ...]]


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


@pytest.fixture(scope="module")
def sandbox_server(sandbox: StartSandbox, store: Store) -> Iterator[SandboxProcess]:
    with sandbox(capacity=64) as process:
        process.attach_blocks(store, 8)
        yield process


@pytest.fixture
def other(sandbox: StartSandbox, store: Store) -> Iterator[SandboxProcess]:
    with sandbox(capacity=64) as process:
        process.attach_blocks(store, 8)
        yield process


@pytest.fixture
def table(sandbox_server: SandboxProcess, store: Store) -> RoutingTable:
    return sandbox_server.attach_blocks(store, 8)


class Layer:
    """A dispatcher whose functions are at these addresses."""

    def __init__(
        self,
        store: Store,
        table: RoutingTable,
        addresses: Sequence[str],
        *,
        activation: ActivationSettings | None = None,
        **changes: Any,
    ) -> None:
        self.metrics = DispatchMetrics()
        self.dispatcher = Dispatcher(
            store,
            at(table, *addresses),
            metrics=self.metrics,
            timeouts=DispatchTimeouts(connect_timeout_s=1.0, call_timeout_s=HUNG_S),
            activation=activation,
            resilience=replace(PATIENT, **changes),
        )
        generator = torch.Generator().manual_seed(0)
        layer = store.manifest.layers[0]
        self.hidden = torch.randn(1, layer.hidden_size, generator=generator)  # [T, H]
        scores = torch.rand(1, layer.num_experts, generator=generator)  # [T, E]
        self.weights, self.index = scores.topk(layer.top_k)  # [T, k]
        self.expected = self.compute()

    def compute(self) -> torch.Tensor:
        return self.dispatcher.compute(0, self.hidden, self.index, self.weights)

    def check(self, n_times: int = 1) -> float:
        """Compute, compare, and return the longest time that it took."""
        times_s = []
        for _ in range(n_times):
            begun_s = time.monotonic()
            torch.testing.assert_close(self.compute(), self.expected)
            times_s.append(time.monotonic() - begun_s)
        return max(times_s)

    def count(self, name: str) -> float:
        return float(getattr(self.metrics, name)._value.get())


@pytest.fixture
def layer(store: Store, table: RoutingTable) -> Iterator[Callable[..., Layer]]:
    made: list[Layer] = []

    def make(*addresses: str, **changes: Any) -> Layer:
        made.append(Layer(store, table, addresses, **changes))
        return made[-1]

    yield make
    for one in made:
        one.dispatcher.close()


def at(table: RoutingTable, *addresses: str) -> RoutingTable:
    entries = tuple(FunctionEndpoints(e.spec, addresses) for e in table.functions)
    return replace(table, functions=entries)


@contextmanager
def stopped(process: SandboxProcess) -> Iterator[None]:
    os.kill(process.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.process.pid, signal.SIGCONT)


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.005)


def test_a_call_that_takes_long_is_made_at_another_replica_too(
    layer: Callable[..., Layer], sandbox_server: SandboxProcess, other: SandboxProcess
) -> None:
    one = layer(sandbox_server.address, other.address)
    one.check(2 * MIN_SAMPLES)
    n_hedges = one.count("hedges")
    with stopped(other):
        took_s = one.check(4)
    assert took_s < GRACE_S < HUNG_S
    assert one.count("hedges") > n_hedges
    assert one.count("local") == 0


def test_hedges_are_bounded_by_a_share_of_the_calls(
    layer: Callable[..., Layer], serve: Callable[..., Any], sandbox_server: SandboxProcess
) -> None:
    """Half of the calls go to a replica that is always slow; few calls are made twice."""

    def late(connection: socket.socket) -> None:
        host, port = sandbox_server.address.split(":")
        with socket.create_connection((host, int(port))) as onward:
            while request := connection.recv(1 << 20):
                onward.sendall(request)
                answer = onward.recv(1 << 20)
                time.sleep(LATE_S)
                connection.sendall(answer)

    one = layer(
        *(sandbox_server.address, serve(late).address),
        hedge_min_s=0.0,
        hedge_quantile=0.01,
        outlier_detection=OutlierDetectionSettings(
            consecutive_lost_hedges=10**6
        ),  # or it would soon get no calls
    )
    one.check(300)
    n_allowed = 0.05 * one.count("calls") + PATIENT.retry_budget_burst
    assert PATIENT.retry_budget_burst < one.count("hedges") <= n_allowed


def test_a_hung_sandbox_costs_little_is_ejected_and_returns_when_it_goes_on(
    layer: Callable[..., Layer], other: SandboxProcess
) -> None:
    one = layer(other.address, abandon_min_s=SLOW_S, abandon_default_s=SLOW_S)
    one.check(2 * MIN_SAMPLES)
    n_local = one.count("local")
    with stopped(other):
        assert one.check(2) < SLOW_S + GRACE_S
        assert one.count("ejected") == 1
        calls = one.count("calls")
        one.check(20)
        assert one.count("calls") == calls
        assert one.count("local") == n_local + 22

    def answers() -> bool:
        n_local = one.count("local")
        one.check(5)
        return one.count("ejected") == 0 and one.count("local") == n_local

    until(answers)


def test_a_dead_replica_is_tried_once_and_then_left_out(
    layer: Callable[..., Layer], sandbox_server: SandboxProcess, other: SandboxProcess
) -> None:
    one = layer(sandbox_server.address, other.address)
    one.check(4)
    other.process.kill()
    other.process.wait()
    assert one.check(20) < GRACE_S
    assert one.count("failed_calls") == one.count("retries") == 1
    assert one.count("ejected") == 1
    assert one.count("local") == 0


def test_calls_wait_for_a_fresh_replica_in_place_of_a_dead_one(
    layer: Callable[..., Layer], store: Store, table: RoutingTable, sandbox_server: SandboxProcess,
    other: SandboxProcess,
) -> None:  # fmt: skip
    """Once for all calls to the dead one, not once for each."""
    activation = ActivationSettings(
        lambda _: None, timeout_s=DEADLINE_S, replacement_timeout_s=DEADLINE_S
    )
    one = layer(other.address, activation=activation)
    one.check(2)
    other.process.kill()
    other.process.wait()
    fresh = threading.Timer(0.1, one.dispatcher.replace_table, [replace(table, version=2)])
    fresh.start()
    one.check(3)
    fresh.join()
    assert one.count("local") == 0


def test_calls_to_a_dead_sandbox_that_nothing_replaces_are_computed_here_after_one_wait(
    layer: Callable[..., Layer], other: SandboxProcess, waits_of: Callable[[Dispatcher], Any]
) -> None:
    activation = ActivationSettings(lambda _: None, timeout_s=DEADLINE_S, replacement_timeout_s=0.3)
    one = layer(other.address, activation=activation)
    one.check(2)
    other.process.kill()
    other.process.wait()
    waits = waits_of(one.dispatcher)
    one.check(10)
    assert 0 < waits.requested_s < 0.3 * 3  # were it waited for each time: 0.3 * 10
    assert one.count("local") == 10


def test_wrong_answers_eject_and_a_refusal_for_want_of_room_does_not(
    layer: Callable[..., Layer],
    serve: Callable[..., Any],
    sandbox_server: SandboxProcess,
) -> None:
    def answering(status: str) -> Callable[[socket.socket], None]:
        def behave(connection: socket.socket) -> None:
            while connection.recv(1 << 20):
                connection.sendall(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode())

        return behave

    for status, is_ejected in (("500 Fault", True), ("200 OK", True), ("429 Busy", False)):
        bad = serve(answering(status))
        # Not probed while this runs: one that answers 200 to everything would come back.
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
def test_deadlines_that_do_not_nest_are_refused(timeouts: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="each at most the next"):
        DispatchTimeouts(*timeouts)


def test_a_layer_is_computed_here_when_its_deadline_has_passed(
    store: Store, table: RoutingTable, serve: Callable[..., Any]
) -> None:
    def never(connection: socket.socket) -> None:
        while connection.recv(1 << 20):
            pass

    metrics = DispatchMetrics()
    activation = ActivationSettings(
        lambda _: None, timeout_s=DEADLINE_S, replacement_timeout_s=DEADLINE_S
    )
    dispatcher = Dispatcher(
        store,
        at(table, serve(never).address, serve(never).address),
        metrics=metrics,
        timeouts=DispatchTimeouts(0.1, 0.3, 0.5),
        activation=activation,
        resilience=replace(PATIENT, abandon_default_s=DEADLINE_S),
    )
    layer = store.manifest.layers[0]
    hidden, index = torch.ones(1, layer.hidden_size), torch.zeros(1, 1, dtype=torch.int64)
    begun_s = time.monotonic()
    dispatcher.compute(0, hidden, index, torch.ones(1, 1))
    assert 0.4 < time.monotonic() - begun_s < 0.5 + GRACE_S
    assert metrics.local._value.get() == 1
    dispatcher.close()
