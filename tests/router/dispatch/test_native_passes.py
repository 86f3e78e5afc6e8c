"""Passes of programs, which call the native functions themselves: what is told, and when."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox

from faasmoe_contracts.store import Store
from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.endpoint_health import EndpointHealth
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.native_dispatch import MAX_LEFT_EVENTS

DEADLINE_S = 120.0
TOKEN = "a-token"
N_LAYERS, N_ROWS, HIDDEN_SIZE, TOP_K = 3, 2, 32, 2
_ADDRESSES = (ctypes.c_void_p,) * 3
BEGIN = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, *(ctypes.c_int64,) * 4, *_ADDRESSES)
BEGUN = (0, 2)  # with calls in flight, or all computed by this process
FINISH = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    """Three MoE layers of 8 experts, hidden size 32, float32."""
    try:
        load()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    return prepared_store("mixtral")


@pytest.fixture
def sandbox_server(sandbox: StartSandbox, tmp_path: Path) -> Iterator[SandboxProcess]:
    with sandbox(capacity=64, token=TOKEN, socket_dir=tmp_path) as process:
        yield process


class Program:
    """Runs passes as a program of decoder layers does."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        assert dispatcher.native is not None
        self.dispatcher, self.native = dispatcher, dispatcher.native

    def run_pass(self) -> int:
        """Run a pass; return how many of its layers were native."""
        program = self.native.program
        begin, finish = BEGIN(program.begin), FINISH(program.finish)
        self.dispatcher.start_pass(N_ROWS)
        n_native = 0
        for layer in range(N_LAYERS):
            hidden, index, weight = self.arguments()
            addresses = (hidden.data_ptr(), index.data_ptr(), weight.data_ptr())
            output = torch.empty_like(hidden)
            if begin(program.context, layer, N_ROWS, HIDDEN_SIZE, TOP_K, *addresses) in BEGUN:
                n_native += not finish(program.context, layer, output.data_ptr())
        self.native.finish_pass()
        return n_native

    @staticmethod
    def arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = torch.arange(N_ROWS * TOP_K).view(N_ROWS, TOP_K)
        return torch.ones(N_ROWS, HIDDEN_SIZE), index, torch.ones(N_ROWS, TOP_K)


@pytest.fixture
def program(
    sandbox_server: SandboxProcess, store: Store, tmp_path: Path, metrics: DispatchMetrics
) -> Iterator[Program]:
    table = sandbox_server.attach_blocks(store, 8)
    dispatcher = Dispatcher(store, table, metrics=metrics, token=TOKEN, socket_dir=tmp_path)
    program = Program(dispatcher)
    assert program.native.connector.wait_until_open([sandbox_server.address], DEADLINE_S)
    yield program
    dispatcher.close()


@pytest.fixture
def metrics() -> DispatchMetrics:
    return DispatchMetrics()


@pytest.fixture
def responses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the responses that health was told of."""
    recorded: list[int] = []

    def record(self: EndpointHealth, address: str, *, n_rows: int, elapsed_s: float) -> None:
        recorded.append(n_rows)

    monkeypatch.setattr(EndpointHealth, "record_response", record)
    return recorded


def shown(metrics: DispatchMetrics, name: str) -> float:
    """Return a metric as a scrape would see it."""
    samples = [sample for metric in metrics.windows.collect() for sample in metric.samples]
    return next(float(sample.value) for sample in samples if sample.name == name)


def test_metrics_show_every_pass_while_health_is_told_of_several_at_once(
    program: Program, metrics: DispatchMetrics, responses: list[int]
) -> None:
    n_passes = -(-MAX_LEFT_EVENTS // N_LAYERS)
    for number in range(1, n_passes + 1):
        assert program.run_pass() == N_LAYERS
        assert shown(metrics, "faasmoe_router_mailbox_calls_total") == number * N_LAYERS
        assert shown(metrics, "faasmoe_router_layer_seconds_count") == number * N_LAYERS
        assert len(responses) == (n_passes * N_LAYERS if number == n_passes else 0)
    assert set(responses) == {N_ROWS}


def test_general_path_follows_what_health_is_told_of_the_calls_before(
    program: Program, responses: list[int]
) -> None:
    program.run_pass()
    assert not responses
    program.dispatcher.compute_general(0, *program.arguments())
    assert len(responses) == N_LAYERS + 1


def test_declined_call_is_told_at_once_with_those_before(
    program: Program, sandbox_server: SandboxProcess, responses: list[int]
) -> None:
    assert program.run_pass() == N_LAYERS
    for function in sandbox_server.http.get("/v1/functions").json()["functions"]:
        sandbox_server.http.delete(f"/v1/functions/{function['id']}")
    assert program.run_pass() == 0
    assert len(responses) == N_LAYERS
