"""Colocated functions of this machine: the same results with fewer calls."""

from __future__ import annotations

import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from raw_http import DEADLINE_S, wait_until
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import OutputMode
from faasmoe_expert.functions import ExpertFunction
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.cold_start import LOST_S, ActivationSettings
from faasmoe_router.dispatch.colocation import PASSES_BEFORE_MAPPING, ColocatedFunctions
from faasmoe_router.dispatch.colocation_policy import (
    MAX_COLOCATED_ROWS,
    PASSES_BETWEEN_RANKINGS,
    ColocationPolicy,
)
from faasmoe_router.dispatch.fanout import DispatchTimeouts
from faasmoe_router.dispatch.local_functions import map_function
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.routing import RoutingIndex

TOKEN = "a-token"
N_LAYERS = 3
N_FUNCTIONS = 3 * N_LAYERS
PATIENT = DispatchTimeouts(DEADLINE_S, DEADLINE_S, DEADLINE_S)  # for a busy machine


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="faasmoe-") as folder:
        yield Path(folder) / "near"


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


@pytest.fixture(scope="module")
def sandbox_server(sandbox: StartSandbox, folder: Path) -> Iterator[SandboxProcess]:
    with sandbox(capacity=100, token=TOKEN, socket_dir=folder) as sandbox_server:
        yield sandbox_server


@pytest.fixture(scope="module")
def table(sandbox_server: SandboxProcess, store: Store) -> RoutingTable:
    """Three functions per layer."""
    return sandbox_server.attach_blocks(store, 3)


@pytest.fixture
def one_colocated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Colocates one of each layer's functions; returns the (rows, seconds) of recorded passes."""
    passes: list[tuple[int, float]] = []

    def n_colocated(self: ColocationPolicy, n_rows: int) -> int:
        return int(n_rows <= MAX_COLOCATED_ROWS)

    def record_pass(self: ColocationPolicy, n_rows: int, elapsed_s: float) -> None:
        passes.append((n_rows, elapsed_s))

    monkeypatch.setattr(ColocationPolicy, "n_colocated", n_colocated)
    monkeypatch.setattr(ColocationPolicy, "record_pass", record_pass)
    return passes


class Router:
    """A dispatcher that computes forward passes through all layers."""

    def __init__(
        self,
        store: Store,
        table: RoutingTable,
        folder: Path | None,
        *,
        monkeypatch: pytest.MonkeyPatch,
        placement: Any = "auto",
        mode: OutputMode = OutputMode.REDUCED,
        activation: ActivationSettings | None = None,
        mailbox: bool = True,
    ) -> None:
        self.metrics = DispatchMetrics()
        self.colocated: ColocatedFunctions | None = None
        monkeypatch.setattr(
            "faasmoe_router.dispatch.dispatcher.ColocatedFunctions", self._create_colocated
        )
        self.dispatcher = Dispatcher(
            store,
            table,
            token=TOKEN,
            metrics=self.metrics,
            timeouts=PATIENT,
            socket_dir=folder,
            placement=placement,
            mode=mode,
            activation=activation,
            mailbox=mailbox,
        )

    def _create_colocated(self, *args: Any, **options: Any) -> ColocatedFunctions:
        self.colocated = ColocatedFunctions(*args, **options)
        return self.colocated

    @property
    def n_mapped(self) -> int:
        assert self.colocated is not None
        return len(self.colocated.mapped)

    def run(self, n_rows: int) -> list[Tensor]:
        """Return each layer's output, [T, H]."""
        generator = torch.Generator().manual_seed(n_rows)
        hidden = torch.randn(n_rows, 32, generator=generator)  # [T, H]
        index = torch.rand(n_rows, 8, generator=generator).topk(2).indices  # [T, 2]
        weight = torch.rand(n_rows, 2, generator=generator)  # [T, 2]
        layers = range(N_LAYERS)
        return [self.dispatcher.compute(layer, hidden, index, weight) for layer in layers]

    def function_calls(self) -> int:
        """Return how often functions were called or computed here; a frame may call several."""
        totals = self.dispatcher.load.snapshot(time.monotonic())
        return sum(total.calls for total in totals.values())

    def counted(self) -> tuple[float, float]:
        """Return the number of calls and of colocated computations so far."""
        self.metrics.windows.before_taking()
        return read_metric(self.metrics, "calls"), read_metric(self.metrics, "colocated")

    def run_until_mapping(self) -> None:
        """Run the passes after which functions are mapped."""
        for _ in range(PASSES_BEFORE_MAPPING):
            self.run(4)

    def warm(self) -> None:
        """Run until the functions are mapped."""
        self.run_until_mapping()
        wait_until(lambda: self.n_mapped == N_FUNCTIONS)


def read_metric(metrics: DispatchMetrics, name: str) -> float:
    return float(getattr(metrics, name).collect()[0].samples[0].value)


OpenRouter = Callable[..., Router]


@pytest.fixture
def router(
    store: Store, table: RoutingTable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OpenRouter]:
    made: list[Router] = []

    def make(**options: Any) -> Router:
        defaults = {"store": store, "table": table, "folder": folder}
        made.append(Router(**{**defaults, **options}, monkeypatch=monkeypatch))
        return made[-1]

    yield make
    for each in made:
        each.dispatcher.close()


@pytest.mark.parametrize("n_rows", [1, 2, 7, 40])
def test_colocated_results_equal_those_of_sandboxes(
    n_rows: int, router: OpenRouter, one_colocated: list[tuple[int, float]]
) -> None:
    hot, functions = router(), router(placement="functions")
    hot.warm()
    calls, colocated = hot.function_calls(), hot.counted()[1]
    for got, expected in zip(hot.run(n_rows), functions.run(n_rows), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    n_colocated = hot.counted()[1] - colocated
    assert functions.function_calls() == hot.function_calls() - calls
    assert functions.counted()[1] == 0
    assert 0 < n_colocated <= N_LAYERS or n_rows < 7  # few rows may not hit the hot function


def test_model_that_answers_a_short_request_maps_nothing(router: OpenRouter) -> None:
    short = router()
    for _ in range(PASSES_BEFORE_MAPPING - 1):
        short.run(4)
    assert short.colocated is not None
    assert short.colocated.wanted == frozenset()
    short.run(4)
    assert len(short.colocated.wanted) == N_FUNCTIONS


def test_all_functions_of_each_layer_may_be_colocated(
    router: OpenRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ColocationPolicy, "n_colocated", lambda self, n_rows: 3)
    monkeypatch.setattr(ColocationPolicy, "record_pass", lambda self, n_rows, elapsed_s: None)
    hot, functions = router(), router(placement="functions")
    hot.warm()
    calls = hot.counted()[0]
    for got, expected in zip(hot.run(9), functions.run(9), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert hot.counted()[0] == calls


def test_passes_are_timed_although_a_function_is_at_zero(
    router: OpenRouter, table: RoutingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial whose passes never count would never end."""
    passes: list[int] = []
    monkeypatch.setattr(ColocationPolicy, "n_colocated", lambda self, n_rows: 3)
    monkeypatch.setattr(
        ColocationPolicy, "record_pass", lambda self, n_rows, elapsed_s: passes.append(n_rows)
    )
    last = table.functions[-1]
    functions = (*table.functions[:-1], replace(last, addresses=()))
    hot = router(table=replace(table, functions=functions))
    hot.run_until_mapping()
    wait_until(lambda: hot.n_mapped == N_FUNCTIONS - 1)
    hidden, first_expert = torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.int64)
    for layer in range(N_LAYERS):
        hot.dispatcher.compute(layer, hidden, first_expert, torch.ones(1, 1))
    assert passes[-1:] == [1]


def test_passes_are_timed_once_their_hot_functions_are_mapped(
    router: OpenRouter, one_colocated: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def map_when_released(spec: FunctionSpec, store: Store) -> ExpertFunction:
        assert go.wait(DEADLINE_S)
        return map_function(spec, store)

    monkeypatch.setattr("faasmoe_router.dispatch.colocation.map_function", map_when_released)
    hot = router()
    hot.run_until_mapping()
    hot.run(5)
    assert one_colocated == []  # nothing is mapped yet
    go.set()
    wait_until(lambda: hot.n_mapped == N_FUNCTIONS)
    hot.run(5)
    hot.run(9)
    assert [n_rows for n_rows, _ in one_colocated] == [5, 9]
    assert all(elapsed_s > 0 for _, elapsed_s in one_colocated)


def test_pass_with_a_failure_is_not_recorded(
    router: OpenRouter, table: RoutingTable, one_colocated: list[tuple[int, float]]
) -> None:
    hot = router()
    hot.warm()
    last = table.functions[-1]
    hot.dispatcher.update_addresses(1, {last.spec.id: ("127.0.0.1:1",)})
    one_colocated.clear()
    hot.run(40)
    assert one_colocated == []
    hot.dispatcher.update_addresses(2, {last.spec.id: last.addresses})
    # The function may have to be mapped again, after some passes.
    wait_until(lambda: bool(hot.run(40) and one_colocated))


def test_load_of_a_function_does_not_depend_on_colocation(
    router: OpenRouter, one_colocated: list[tuple[int, float]]
) -> None:
    hot, functions = router(), router(placement="functions")
    hot.warm()
    functions.run_until_mapping()
    for each in (hot, functions):
        each.run(11)
    now_s = time.monotonic()
    hot_totals, functions_totals = (r.dispatcher.load.snapshot(now_s) for r in (hot, functions))
    assert hot_totals.keys() == functions_totals.keys()
    for name, totals in hot_totals.items():
        assert totals[1:] == functions_totals[name][1:]  # calls and rows
    later_totals = hot.dispatcher.load.snapshot(now_s + 100)
    for name, totals in hot_totals.items():
        assert later_totals[name].in_flight_s == pytest.approx(totals.in_flight_s, abs=1e-6)


def test_functions_of_other_machines_are_not_colocated(
    router: OpenRouter, folder: Path, tmp_path: Path, one_colocated: list[tuple[int, float]]
) -> None:
    remote = router(folder=tmp_path)  # without Unix sockets of sandboxes
    remote.run_until_mapping()
    assert remote.n_mapped == 0
    assert remote.counted()[1] == 0


@pytest.mark.parametrize(
    "options", [{"placement": "functions"}, {"folder": None}, {"mode": OutputMode.UNREDUCED}]
)
def test_nothing_is_colocated_where_disabled_or_impossible(
    options: dict[str, Any], router: OpenRouter, one_colocated: list[tuple[int, float]]
) -> None:
    uncolocated = router(**options)
    uncolocated.run_until_mapping()
    assert uncolocated.colocated is None
    assert uncolocated.counted()[1] == 0


def test_function_that_scales_to_zero_is_released(
    router: OpenRouter,
    table: RoutingTable,
    one_colocated: list[tuple[int, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mapped: list[weakref.ref[ExpertFunction]] = []

    def map_and_record(spec: FunctionSpec, store: Store) -> ExpertFunction:
        function = map_function(spec, store)
        mapped.append(weakref.ref(function))
        return function

    monkeypatch.setattr("faasmoe_router.dispatch.colocation.map_function", map_and_record)
    hot = router()
    hot.warm()
    hot.run(40)
    without_addresses = replace(
        table, functions=tuple(replace(f, addresses=()) for f in table.functions)
    )
    hot.dispatcher.replace_table(without_addresses)  # an idle router releases them too
    assert hot.n_mapped == 0
    # The thread that mapped the last one may hold it a little longer.
    wait_until(lambda: [ref() for ref in mapped] == [None] * N_FUNCTIONS)
    hot.run(1)  # from the store, as no sandbox has them
    assert hot.n_mapped == 0
    hot.dispatcher.replace_table(table)
    hot.warm()


def test_corrupted_functions_are_called_at_their_sandboxes(
    router: OpenRouter, store: Store, tmp_path: Path, one_colocated: list[tuple[int, float]]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    hot, functions = router(store=Store.open(copy)), router(placement="functions")
    hot.warm()
    for entry in store.manifest.layers:
        file = copy / entry.file
        content = bytearray(file.read_bytes())
        content[-4096:] = bytes(b ^ 1 for b in content[-4096:])
        content[len(content) // 2] ^= 1
        with file.open("r+b") as written:
            written.write(content)
    for got, expected in zip(hot.run(40), functions.run(40), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert read_metric(hot.metrics, "local") == 0
    hot.run(40)
    assert hot.n_mapped < N_FUNCTIONS


def test_function_released_while_it_is_being_mapped_is_not_kept(
    router: OpenRouter, table: RoutingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, started = threading.Event(), threading.Event()
    mapped: list[weakref.ref[ExpertFunction]] = []

    def map_slowly(spec: FunctionSpec, store: Store) -> ExpertFunction:
        started.set()
        assert go.wait(DEADLINE_S)
        function = map_function(spec, store)
        mapped.append(weakref.ref(function))
        return function

    monkeypatch.setattr("faasmoe_router.dispatch.colocation.map_function", map_slowly)
    hot = router()
    hot.run_until_mapping()
    assert started.wait(DEADLINE_S)
    without_addresses = replace(
        table, functions=tuple(replace(f, addresses=()) for f in table.functions)
    )
    hot.dispatcher.replace_table(without_addresses)
    hot.run(4)
    go.set()
    wait_until(lambda: [ref() for ref in mapped] == [None])
    assert hot.n_mapped == 0
    hot.dispatcher.replace_table(table)
    hot.warm()
    assert len(mapped) == 1 + N_FUNCTIONS  # those still queued at the release were not mapped then


@pytest.fixture
def all_colocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colocates all functions of each layer."""
    monkeypatch.setattr(ColocationPolicy, "n_colocated", lambda self, n_rows: 3)
    monkeypatch.setattr(ColocationPolicy, "record_pass", lambda self, n_rows, elapsed_s: None)


def without_sandboxes(table: RoutingTable) -> RoutingTable:
    return replace(table, functions=tuple(replace(f, addresses=()) for f in table.functions))


@pytest.mark.usefixtures("all_colocated")
@pytest.mark.parametrize("is_native", [True, False])
def test_lost_sandbox_interrupts_no_pass_whose_functions_are_colocated(
    is_native: bool, router: OpenRouter, table: RoutingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[str] = []
    hot = router(activation=ActivationSettings(requested.extend), mailbox=is_native)
    hot.warm()
    expected = hot.run(40)
    colocated = hot.colocated
    assert colocated is not None
    specs = [f.spec for f in table.functions]
    mapped = [colocated.find(spec) for spec in specs]
    hidden, index, weight = (
        torch.ones(1, 32),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1),
    )

    def map_again(*_: Any, **__: Any) -> ExpertFunction:
        raise AssertionError("a function is mapped again")

    def compute_generally(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a layer is computed over the general path")

    for module in ("colocation", "local_functions"):
        monkeypatch.setattr(f"faasmoe_router.dispatch.{module}.map_function", map_again)
    if is_native:
        monkeypatch.setattr(hot.dispatcher, "compute_general", compute_generally)
    hot.dispatcher.compute(0, hidden, index, weight)
    hot.dispatcher.replace_table(replace(without_sandboxes(table), version=1))
    for layer in range(1, N_LAYERS):  # of the pass that runs
        hot.dispatcher.compute(layer, hidden, index, weight)
    before = hot.counted()[1]
    for got, right in zip(hot.run(40), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    assert sorted(requested) == sorted(spec.id for spec in specs)
    assert hot.counted()[1] == before  # they count as computed in place of sandboxes
    assert read_metric(hot.metrics, "local") == hot.dispatcher.load.local_calls >= N_FUNCTIONS
    hot.dispatcher.replace_table(replace(table, version=2))
    hot.run(40)
    assert hot.counted()[1] >= before + N_FUNCTIONS
    assert [colocated.find(spec) for spec in specs] == mapped


@pytest.mark.usefixtures("all_colocated")
@pytest.mark.parametrize("is_idle_first", [True, False])
def test_idle_router_keeps_no_function_without_a_sandbox(
    is_idle_first: bool, router: OpenRouter, table: RoutingTable
) -> None:
    hot = router(activation=ActivationSettings(lambda names: None))
    hot.warm()
    if is_idle_first:
        hot.dispatcher.release_memory()
        assert hot.n_mapped == N_FUNCTIONS  # sandboxes have them
        hot.dispatcher.replace_table(replace(without_sandboxes(table), version=1))
    else:
        hot.dispatcher.replace_table(replace(without_sandboxes(table), version=1))
        assert hot.n_mapped == N_FUNCTIONS
        hot.dispatcher.release_memory()
    assert hot.n_mapped == 0


@pytest.mark.usefixtures("all_colocated")
@pytest.mark.parametrize("is_native", [True, False])
def test_colocated_function_that_was_requested_ahead_is_found(
    is_native: bool, router: OpenRouter, table: RoutingTable
) -> None:
    hot = router(activation=ActivationSettings(lambda names: None), mailbox=is_native)
    hot.warm()
    absences = hot.dispatcher._executor.absences
    assert absences is not None
    absences.record_missing([f.spec.id for f in table.functions], time.monotonic())
    hot.run(40)  # calls no sandbox
    assert not absences.is_any_missing


def test_function_that_is_not_replaced_is_released_while_passes_run(
    store: Store, table: RoutingTable, folder: Path
) -> None:
    colocated = ColocatedFunctions(store, folder, keep_lost_s=LOST_S)
    served = RoutingIndex.from_table(table, store)
    lost = RoutingIndex.from_table(replace(without_sandboxes(table), version=1), store)
    try:
        for _ in range(PASSES_BEFORE_MAPPING):
            run_pass(colocated, served, now_s=0.0)
        wait_until(lambda: len(colocated.mapped) == N_FUNCTIONS)
        colocated.release_unassigned(lost, 1.0)
        run_pass(colocated, lost, now_s=1.0 + LOST_S)
        assert len(colocated.mapped) == len(colocated.lost) == N_FUNCTIONS
        run_pass(colocated, lost, now_s=1.1 + LOST_S)
        for _ in range(2 * PASSES_BETWEEN_RANKINGS):  # nothing maps them again
            run_pass(colocated, lost, now_s=2.0 + LOST_S)
        assert not colocated.mapped
        assert not colocated.wanted
        assert not colocated.lost
    finally:
        colocated.close()


def run_pass(colocated: ColocatedFunctions, routing: RoutingIndex, *, now_s: float) -> None:
    """Start and finish a pass of one row that takes a millisecond per layer."""
    colocated.start_pass(routing, 1, now_s)
    for layer in range(N_LAYERS):
        colocated.finish_layer(layer, 0.001, is_valid_sample=True)
