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
from rawhttp import until
from sandboxes import OpenSandbox, PreparedStore, SandboxProcess
from torch import Tensor

from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec, FunctionTable
from faasmoe_expert.wire import Mode
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.calls import Timeouts
from faasmoe_router.dispatch.hot import HotFunctions
from faasmoe_router.dispatch.local import map_function
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.placement import MAX_ROWS, Placement

TOKEN = "a-token"
N_LAYERS = 3
PATIENT = Timeouts(connect_timeout_s=20.0, call_timeout_s=20.0, layer_timeout_s=30.0)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="faasmoe-") as folder:
        yield Path(folder) / "near"


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


@pytest.fixture(scope="module")
def box(sandbox: OpenSandbox, folder: Path) -> Iterator[SandboxProcess]:
    with sandbox(capacity=100, token=TOKEN, socket_dir=folder) as box:
        yield box


@pytest.fixture(scope="module")
def table(box: SandboxProcess, store: Store) -> FunctionTable:
    """Three functions a layer."""
    return box.attach_blocks(store, 3)


@pytest.fixture
def one_is_here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """One of each layer's functions is to be computed here; gives the passes that were counted."""
    passes: list[tuple[int, float]] = []

    def here(self: Placement, n_rows: int) -> int:
        return int(n_rows <= MAX_ROWS)

    def add(self: Placement, n_rows: int, took_s: float) -> None:
        passes.append((n_rows, took_s))

    monkeypatch.setattr(Placement, "here", here)
    monkeypatch.setattr(Placement, "add", add)
    return passes


class Router:
    """Passes through all layers."""

    def __init__(
        self,
        store: Store,
        table: FunctionTable,
        folder: Path | None,
        *,
        placement: Any = "auto",
        mode: Mode = Mode.REDUCED,
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
    def hot(self) -> HotFunctions | None:
        return self.dispatcher._filler._hot

    @property
    def n_mapped(self) -> int:
        assert self.hot is not None
        return len(self.hot._mapped)

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
        return self.metrics.calls._value.get(), self.metrics.here._value.get()

    def warm(self) -> None:
        """Run until the hot functions are mapped."""
        self.run(4)
        until(lambda: self.n_mapped == N_LAYERS)


Open = Callable[..., Router]


@pytest.fixture
def router(store: Store, table: FunctionTable, folder: Path) -> Iterator[Open]:
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
    n_rows: int, router: Open, one_is_here: list[tuple[int, float]]
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
    router: Open, one_is_here: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def held(spec: FunctionSpec, store: Store) -> ExpertFunction:
        assert go.wait(20.0)
        return map_function(spec, store)

    monkeypatch.setattr("faasmoe_router.dispatch.hot.map_function", held)
    hot = router()
    hot.run(5)
    assert one_is_here == []  # nothing is mapped yet
    go.set()
    until(lambda: hot.n_mapped == N_LAYERS)
    hot.run(5)
    hot.run(9)
    assert [n_rows for n_rows, _ in one_is_here] == [5, 9]
    assert all(took_s > 0 for _, took_s in one_is_here)


def test_a_pass_with_a_failure_says_nothing(
    router: Open, table: FunctionTable, one_is_here: list[tuple[int, float]]
) -> None:
    hot = router()
    hot.warm()
    last = table.functions[-1]
    hot.dispatcher.move_functions(1, {last.spec.id: ("127.0.0.1:1",)})
    one_is_here.clear()
    hot.run(40)
    assert one_is_here == []
    hot.dispatcher.move_functions(2, {last.spec.id: last.addresses})
    until(lambda: bool(hot.run(40) and one_is_here))  # it may have to be mapped again


def test_the_load_of_a_function_is_the_same_wherever_it_is_computed(
    router: Open, one_is_here: list[tuple[int, float]]
) -> None:
    hot, functions = router(), router(placement="functions")
    hot.warm()
    functions.run(4)
    for each in (hot, functions):
        each.run(11)
    found = [
        {name: reading[1:] for name, reading in each.dispatcher.load.read(0.0).items()}
        for each in (hot, functions)
    ]
    assert found[0] == found[1]
    assert all(figures.open == 0 for figures in hot.dispatcher.load._figures.values())


def test_functions_of_other_machines_are_called(
    router: Open, folder: Path, tmp_path: Path, one_is_here: list[tuple[int, float]]
) -> None:
    far = router(folder=tmp_path)  # where no sandbox has a socket
    for _ in range(3):
        far.run(7)
    assert far.n_mapped == 0
    assert far.counted()[1] == 0


@pytest.mark.parametrize(
    "options", [{"placement": "functions"}, {"folder": None}, {"mode": Mode.UNREDUCED}]
)
def test_nothing_is_computed_here_where_it_is_not_asked_for_or_cannot_be(
    options: dict[str, Any], router: Open, one_is_here: list[tuple[int, float]]
) -> None:
    cold = router(**options)
    cold.run(7)
    assert cold.hot is None
    assert cold.counted()[1] == 0


def test_a_function_that_goes_to_zero_is_let_go(
    router: Open, table: FunctionTable, one_is_here: list[tuple[int, float]]
) -> None:
    hot = router()
    hot.warm()
    hot.run(40)
    assert hot.hot is not None
    mapped = [weakref.ref(function) for function in hot.hot._mapped.values()]
    nowhere = replace(table, functions=tuple(replace(f, addresses=()) for f in table.functions))
    hot.dispatcher.replace_table(nowhere)  # and nothing runs: an idle router lets go, too
    assert hot.n_mapped == 0
    assert [ref() for ref in mapped] == [None] * N_LAYERS
    hot.run(1)  # from the store, as nobody holds them
    assert hot.n_mapped == 0
    hot.dispatcher.replace_table(table)
    hot.warm()


def test_wrong_bytes_here_are_left_to_the_sandboxes(
    router: Open, store: Store, tmp_path: Path, one_is_here: list[tuple[int, float]]
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
    router: Open, table: FunctionTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Event(), threading.Event()

    def slow(spec: Any, store: Store) -> object:
        begun.set()
        assert go.wait(20.0)
        return object()

    monkeypatch.setattr("faasmoe_router.dispatch.hot.map_function", slow)
    hot = router()
    hot.run(4)
    assert begun.wait(20.0)
    nowhere = replace(table, functions=tuple(replace(f, addresses=()) for f in table.functions))
    hot.dispatcher.replace_table(nowhere)
    hot.run(4)
    go.set()
    assert hot.hot is not None
    hot.hot._thread.submit(lambda: None).result(20.0)  # behind all that was asked for
    assert hot.n_mapped == 0
