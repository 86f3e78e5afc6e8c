"""Hot functions of this machine, computed in the router: the same results, fewer calls."""

from __future__ import annotations

import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from raw_http import wait_until
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_contracts.wire import OutputMode
from faasmoe_expert.functions import ExpertFunction
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.calls import DispatchTimeouts
from faasmoe_router.dispatch.colocation import (
    MAX_COLOCATED_ROWS,
    ColocatedFunctions,
    ColocationPolicy,
)
from faasmoe_router.dispatch.local_functions import map_function
from faasmoe_router.dispatch.metrics import DispatchMetrics

TOKEN = "a-token"
N_LAYERS = 3
PATIENT = DispatchTimeouts(connect_timeout_s=20.0, call_timeout_s=20.0, layer_timeout_s=30.0)


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
    """Three functions a layer."""
    return sandbox_server.attach_blocks(store, 3)


@pytest.fixture
def one_colocated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """One of each layer's functions is to be computed here; gives the passes that were counted."""
    passes: list[tuple[int, float]] = []

    def n_colocated(self: ColocationPolicy, n_rows: int) -> int:
        return int(n_rows <= MAX_COLOCATED_ROWS)

    def record_pass(self: ColocationPolicy, n_rows: int, took_s: float) -> None:
        passes.append((n_rows, took_s))

    monkeypatch.setattr(ColocationPolicy, "n_colocated", n_colocated)
    monkeypatch.setattr(ColocationPolicy, "record_pass", record_pass)
    return passes


class Router:
    """Passes through all layers."""

    def __init__(
        self,
        store: Store,
        table: RoutingTable,
        folder: Path | None,
        *,
        placement: Any = "auto",
        mode: OutputMode = OutputMode.REDUCED,
    ) -> None:
        self.metrics = DispatchMetrics()
        self.dispatcher = Dispatcher(
            store,
            table,
            token=TOKEN,
            metrics=self.metrics,
            timeouts=PATIENT,
            socket_dir=folder,
            placement=placement,
            mode=mode,
        )

    @property
    def colocated(self) -> ColocatedFunctions | None:
        return self.dispatcher._executor._colocated

    @property
    def n_mapped(self) -> int:
        assert self.colocated is not None
        return len(self.colocated._mapped)

    def run(self, n_rows: int) -> list[Tensor]:
        """Return what each layer gives, [T, H]."""
        generator = torch.Generator().manual_seed(n_rows)
        hidden = torch.randn(n_rows, 32, generator=generator)  # [T, H]
        index = torch.rand(n_rows, 8, generator=generator).topk(2).indices  # [T, 2]
        weight = torch.rand(n_rows, 2, generator=generator)  # [T, 2]
        layers = range(N_LAYERS)
        return [self.dispatcher.compute(layer, hidden, index, weight) for layer in layers]

    def counted(self) -> tuple[float, float]:
        """Calls so far, and what was computed here."""
        return self.metrics.calls._value.get(), self.metrics.colocated._value.get()

    def warm(self) -> None:
        """Run until the hot functions are mapped."""
        self.run(4)
        wait_until(lambda: self.n_mapped == N_LAYERS)


Open = Callable[..., Router]


@pytest.fixture
def router(store: Store, table: RoutingTable, folder: Path) -> Iterator[Open]:
    made: list[Router] = []

    def make(**options: Any) -> Router:
        given = {"store": store, "table": table, "folder": folder, **options}
        made.append(Router(given.pop("store"), given.pop("table"), given.pop("folder"), **given))
        return made[-1]

    yield make
    for each in made:
        each.dispatcher.close()


@pytest.mark.parametrize("n_rows", [1, 2, 7, 40])
def test_what_is_computed_here_equals_what_functions_answer(
    n_rows: int, router: Open, one_colocated: list[tuple[int, float]]
) -> None:
    hot, functions = router(), router(placement="functions")
    hot.warm()
    before = hot.counted()
    for got, expected in zip(hot.run(n_rows), functions.run(n_rows), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    calls, here = (now - then for now, then in zip(hot.counted(), before, strict=True))
    assert functions.counted() == (calls + here, 0)
    assert 0 < here <= N_LAYERS or n_rows < 7  # few rows may not hit the hot one


def test_passes_are_timed_once_their_hot_functions_are_there(
    router: Open, one_colocated: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def blocked(spec: FunctionSpec, store: Store) -> ExpertFunction:
        assert go.wait(20.0)
        return map_function(spec, store)

    monkeypatch.setattr("faasmoe_router.dispatch.colocation.map_function", blocked)
    hot = router()
    hot.run(5)
    assert one_colocated == []  # nothing is mapped yet
    go.set()
    wait_until(lambda: hot.n_mapped == N_LAYERS)
    hot.run(5)
    hot.run(9)
    assert [n_rows for n_rows, _ in one_colocated] == [5, 9]
    assert all(took_s > 0 for _, took_s in one_colocated)


def test_a_pass_with_a_failure_says_nothing(
    router: Open, table: RoutingTable, one_colocated: list[tuple[int, float]]
) -> None:
    hot = router()
    hot.warm()
    last = table.functions[-1]
    hot.dispatcher.update_addresses(1, {last.spec.id: ("127.0.0.1:1",)})
    one_colocated.clear()
    hot.run(40)
    assert one_colocated == []
    hot.dispatcher.update_addresses(2, {last.spec.id: last.addresses})
    wait_until(lambda: bool(hot.run(40) and one_colocated))  # it may have to be mapped again


def test_the_load_of_a_function_is_the_same_wherever_it_is_computed(
    router: Open, one_colocated: list[tuple[int, float]]
) -> None:
    hot, functions = router(), router(placement="functions")
    hot.warm()
    functions.run(4)
    for each in (hot, functions):
        each.run(11)
    found = [
        {name: reading[1:] for name, reading in each.dispatcher.load.snapshot(0.0).items()}
        for each in (hot, functions)
    ]
    assert found[0] == found[1]
    assert all(figures.n_in_flight == 0 for figures in hot.dispatcher.load._counters.values())


def test_functions_of_other_machines_are_called(
    router: Open, folder: Path, tmp_path: Path, one_colocated: list[tuple[int, float]]
) -> None:
    far = router(folder=tmp_path)  # where no sandbox has a socket
    for _ in range(3):
        far.run(7)
    assert far.n_mapped == 0
    assert far.counted()[1] == 0


@pytest.mark.parametrize(
    "options", [{"placement": "functions"}, {"folder": None}, {"mode": OutputMode.UNREDUCED}]
)
def test_nothing_is_computed_here_where_it_is_not_asked_for_or_cannot_be(
    options: dict[str, Any], router: Open, one_colocated: list[tuple[int, float]]
) -> None:
    cold = router(**options)
    cold.run(7)
    assert cold.colocated is None
    assert cold.counted()[1] == 0


def test_a_function_that_goes_to_zero_is_let_go(
    router: Open, table: RoutingTable, one_colocated: list[tuple[int, float]]
) -> None:
    hot = router()
    hot.warm()
    hot.run(40)
    assert hot.colocated is not None
    mapped = [weakref.ref(function) for function in hot.colocated._mapped.values()]
    nowhere = replace(table, functions=tuple(replace(f, addresses=()) for f in table.functions))
    hot.dispatcher.replace_table(nowhere)  # and nothing runs: an idle router lets go, too
    assert hot.n_mapped == 0
    assert [ref() for ref in mapped] == [None] * N_LAYERS
    hot.run(1)  # from the store, as nobody holds them
    assert hot.n_mapped == 0
    hot.dispatcher.replace_table(table)
    hot.warm()


def test_wrong_bytes_here_are_left_to_the_sandboxes(
    router: Open, store: Store, tmp_path: Path, one_colocated: list[tuple[int, float]]
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
    assert hot.metrics.local._value.get() == 0
    hot.run(40)
    assert hot.n_mapped < N_LAYERS


def test_what_is_wanted_no_more_while_it_is_being_mapped_is_not_kept(
    router: Open, table: RoutingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Event(), threading.Event()

    def slow(spec: Any, store: Store) -> object:
        begun.set()
        assert go.wait(20.0)
        return object()

    monkeypatch.setattr("faasmoe_router.dispatch.colocation.map_function", slow)
    hot = router()
    hot.run(4)
    assert begun.wait(20.0)
    nowhere = replace(table, functions=tuple(replace(f, addresses=()) for f in table.functions))
    hot.dispatcher.replace_table(nowhere)
    hot.run(4)
    go.set()
    assert hot.colocated is not None
    hot.colocated._mapping_executor.submit(lambda: None).result(
        20.0
    )  # behind all that was asked for
    assert hot.n_mapped == 0
