"""Layers whose functions are missing, being activated, or moved during the calls."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from faasmoe_up import free_port
from raw_http import wait_until
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.cold_start import (
    REQUEST_INTERVAL_S,
    ActivationSettings,
    ActivationWaiter,
)
from faasmoe_router.dispatch.endpoint_health import ResilienceSettings
from faasmoe_router.dispatch.fanout import DispatchTimeouts
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.transport import ConnectionPool

DEADLINE_S = 120.0
N_TOKENS = 12
# These tests are about where calls go, so calls that a busy machine delays are not abandoned.
PATIENT = ResilienceSettings(
    hedge_min_s=DEADLINE_S, abandon_min_s=DEADLINE_S, abandon_default_s=DEADLINE_S
)
Addresses = dict[str, tuple[str, ...]]


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


@pytest.fixture(scope="module")
def sandbox_server(sandbox: StartSandbox, store: Store) -> Iterator[SandboxProcess]:
    with sandbox(capacity=64) as process:
        process.attach_blocks(store, 2)
        yield process


@pytest.fixture(scope="module")
def cold(store: Store) -> RoutingTable:
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 2))
    return RoutingTable(store.manifest.digest, 0, entries)


class Layers:
    """A dispatcher of the store, and the activations that it requested."""

    def __init__(
        self, store: Store, table: RoutingTable | None, *, timeout_s: float, can_wait: bool = True
    ) -> None:
        self.activation_requests: list[list[str]] = []
        self.on_activation_request: Callable[[], None] = lambda: None
        self.metrics = DispatchMetrics()
        self.dispatcher = Dispatcher(
            store,
            table,
            metrics=self.metrics,
            timeouts=DispatchTimeouts(DEADLINE_S, DEADLINE_S, DEADLINE_S),
            activation=ActivationSettings(
                self._request_activation, timeout_s=timeout_s, retry_interval_s=0.02
            )
            if can_wait
            else None,
            resilience=PATIENT,
        )
        layer = store.manifest.layers[0]
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(N_TOKENS, layer.hidden_size, generator=generator)  # [T, H]
        scores = torch.rand(N_TOKENS, layer.num_experts, generator=generator)  # [T, E]
        self.weights, self.index = scores.topk(layer.top_k)  # [T, k]

    def _request_activation(self, names: Any) -> None:
        self.activation_requests.append(list(names))
        self.on_activation_request()

    def compute(self, layer: int = 0) -> torch.Tensor:
        return self.dispatcher.compute(layer, self.hidden, self.index, self.weights)

    @property
    def n_local(self) -> int:
        return self.dispatcher.load.local_calls


@pytest.fixture
def open_layers(store: Store, cold: RoutingTable) -> Iterator[Callable[..., Layers]]:
    opened: list[Layers] = []

    def make(*, timeout_s: float = DEADLINE_S, **given: Any) -> Layers:
        opened.append(Layers(store, given.pop("table", cold), timeout_s=timeout_s, **given))
        return opened[-1]

    yield make
    for layers in opened:
        layers.dispatcher.close()


@pytest.fixture
def expected(open_layers: Callable[..., Layers]) -> torch.Tensor:
    """The first layer's output, computed from the store."""
    layers = open_layers(can_wait=False)
    result = layers.compute()
    assert layers.n_local > 0
    return result


def everywhere(table: RoutingTable, *addresses: str) -> Addresses:
    return {entry.spec.id: addresses for entry in table.functions}


class Forwarder:
    """Forwards connections to an address, from a port that refuses them until `open`."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.n_open = 0
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def open(self) -> None:
        self._listener.listen()
        self._start(self._accept)

    def close(self) -> None:
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                self.n_open += 1
                self._start(self._forward, client)

    def _forward(self, client: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            client,
            socket.create_connection(self._target) as upstream,
        ):
            while True:
                for one in select.select([client, upstream], [], [])[0]:
                    data = one.recv(1 << 16)
                    if not data:
                        self.n_open -= 1
                        return
                    (upstream if one is client else client).sendall(data)


@pytest.fixture
def forwarder(sandbox_server: SandboxProcess) -> Iterator[Forwarder]:
    forwarder = Forwarder(sandbox_server.address)
    yield forwarder
    forwarder.close()


def test_call_waits_until_its_function_is_activated(
    open_layers: Callable[..., Layers],
    cold: RoutingTable,
    sandbox_server: SandboxProcess,
    expected: torch.Tensor,
) -> None:
    layers = open_layers()
    moves = everywhere(cold, sandbox_server.address)
    thread = threading.Thread(target=layers.dispatcher.update_addresses, args=(1, moves))
    layers.on_activation_request = thread.start
    torch.testing.assert_close(layers.compute(), expected)
    thread.join()
    assert layers.n_local == 0
    # Functions of the next layers are requested too: a dozen tokens need every block.
    assert sorted(layers.activation_requests[0]) == sorted(moves)
    assert len(layers.activation_requests) == 1


def test_function_that_is_never_activated_costs_one_timeout_and_is_computed_locally(
    open_layers: Callable[..., Layers], store: Store, expected: torch.Tensor, activation_waits: Any
) -> None:
    layers = open_layers(timeout_s=0.3)
    started_s = time.monotonic()
    results = [layers.compute() for _ in range(20)]
    for layer in range(1, len(store.manifest.layers)):
        layers.compute(layer)
    assert 0 < activation_waits.requested_s < 0.3 * 3  # if each call waited: 0.3 * 20
    for result in results:
        torch.testing.assert_close(result, expected)
    assert layers.n_local > 20
    assert (
        len(layers.activation_requests) <= 2 + (time.monotonic() - started_s) / REQUEST_INTERVAL_S
    )


def test_calls_do_not_wait_without_activation(
    open_layers: Callable[..., Layers], expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ActivationWaiter, "wait", lambda *_, **__: pytest.fail("a call was queued"))
    layers = open_layers(can_wait=False)
    torch.testing.assert_close(layers.compute(), expected)
    assert layers.activation_requests == []
    assert layers.n_local > 0


def test_layer_is_computed_locally_without_a_table_and_nothing_is_requested(
    open_layers: Callable[..., Layers], expected: torch.Tensor
) -> None:
    layers = open_layers(table=None)
    torch.testing.assert_close(layers.compute(), expected)
    assert layers.activation_requests == []
    assert layers.n_local == 1


def test_new_address_is_retried_until_it_accepts(
    open_layers: Callable[..., Layers],
    cold: RoutingTable,
    forwarder: Forwarder,
    expected: torch.Tensor,
) -> None:
    layers = open_layers()
    layers.dispatcher.update_addresses(1, everywhere(cold, forwarder.address))
    delayed_open = threading.Timer(0.15, forwarder.open)
    delayed_open.start()
    torch.testing.assert_close(layers.compute(), expected)
    delayed_open.join()
    assert layers.n_local == 0


def test_new_address_that_never_accepts_is_abandoned(
    open_layers: Callable[..., Layers],
    cold: RoutingTable,
    forwarder: Forwarder,
    expected: torch.Tensor,
) -> None:
    layers = open_layers(timeout_s=0.3)
    layers.dispatcher.update_addresses(1, everywhere(cold, forwarder.address))
    torch.testing.assert_close(layers.compute(), expected)
    assert layers.n_local > 0


def test_address_that_responded_and_died_gets_no_activation_wait(
    open_layers: Callable[..., Layers],
    cold: RoutingTable,
    forwarder: Forwarder,
    expected: torch.Tensor,
    activation_waits: Any,
) -> None:
    forwarder.open()
    layers = open_layers()
    layers.dispatcher.update_addresses(1, everywhere(cold, forwarder.address))
    layers.compute()
    forwarder.close()
    activation_waits.requested_s = 0.0
    torch.testing.assert_close(layers.compute(), expected)
    assert activation_waits.requested_s < 2.0  # the replacement's timeout, not the activation's
    assert layers.n_local > 0


def test_dead_address_is_logged_once_for_many_failed_calls(
    open_layers: Callable[..., Layers], cold: RoutingTable, caplog: pytest.LogCaptureFixture
) -> None:
    layers = open_layers(can_wait=False)
    address = f"127.0.0.1:{free_port()}"
    layers.dispatcher.update_addresses(1, everywhere(cold, address))
    for _ in range(20):
        layers.compute()
    assert layers.n_local >= 20
    assert [f"Call to {address} failed" in text for text in caplog.messages] == [True]


def test_connections_to_removed_addresses_are_closed_immediately(
    open_layers: Callable[..., Layers],
    cold: RoutingTable,
    sandbox_server: SandboxProcess,
    forwarder: Forwarder,
) -> None:
    forwarder.open()
    layers = open_layers()
    layers.dispatcher.update_addresses(1, everywhere(cold, forwarder.address))
    layers.compute()
    assert forwarder.n_open > 0
    layers.dispatcher.update_addresses(2, everywhere(cold, sandbox_server.address))
    wait_until(lambda: not forwarder.n_open)


def test_table_may_be_replaced_while_layers_are_computed(
    open_layers: Callable[..., Layers],
    cold: RoutingTable,
    sandbox_server: SandboxProcess,
    forwarder: Forwarder,
    expected: torch.Tensor,
) -> None:
    forwarder.open()
    layers = open_layers()
    layers.dispatcher.update_addresses(1, everywhere(cold, sandbox_server.address))
    done = threading.Event()

    def move_repeatedly() -> None:
        placements = [
            (sandbox_server.address,),
            (forwarder.address,),
            (sandbox_server.address, forwarder.address),
        ]
        version = 1
        while not done.wait(0.001):
            version += 1
            layers.dispatcher.update_addresses(version, everywhere(cold, *placements[version % 3]))
            layers.dispatcher.replace_table(
                RoutingTable(
                    cold.model_digest,
                    version,
                    tuple(
                        FunctionEndpoints(e.spec, placements[version % 3]) for e in cold.functions
                    ),
                )
            )

    mover = threading.Thread(target=move_repeatedly)
    mover.start()
    try:
        for _ in range(100):
            torch.testing.assert_close(layers.compute(), expected)
    finally:
        done.set()
        mover.join()
    assert layers.n_local == 0


def test_load_meter_records_the_calls(
    open_layers: Callable[..., Layers], cold: RoutingTable, sandbox_server: SandboxProcess
) -> None:
    layers = open_layers()
    layers.dispatcher.update_addresses(1, everywhere(cold, sandbox_server.address))
    started_s = time.monotonic()
    layers.compute()
    now_s = time.monotonic()
    totals = layers.dispatcher.load.snapshot(now_s)
    layer_specs = [e.spec for e in cold.functions if e.spec.layers == (0,)]
    for spec in layer_specs:
        is_hit = torch.isin(layers.index, torch.tensor(spec.experts)).any(dim=1)  # [T]
        assert totals[spec.id].calls == 1
        assert totals[spec.id].rows == int(is_hit.sum())
        assert 0 < totals[spec.id].in_flight_s <= now_s - started_s
    assert layers.dispatcher.load.snapshot(now_s + 100) == totals  # nothing is in flight any more


def test_address_that_starts_to_accept_during_a_fan_out_is_retried(
    open_layers: Callable[..., Layers],
    cold: RoutingTable,
    forwarder: Forwarder,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = open_layers()
    layers.dispatcher.update_addresses(1, everywhere(cold, forwarder.address))
    acquire = ConnectionPool.acquire
    n_connections = 0

    def open_at_second_acquire(pool: ConnectionPool, address: str, *, force_new: bool) -> Any:
        nonlocal n_connections
        n_connections += 1
        if n_connections == 2:
            forwarder.open()
        return acquire(pool, address, force_new=force_new)

    monkeypatch.setattr(ConnectionPool, "acquire", open_at_second_acquire)
    torch.testing.assert_close(layers.compute(), expected)
    assert layers.n_local == 0
