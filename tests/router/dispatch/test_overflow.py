"""Functions that have no place in limited memory: computed in the router, without a wait."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from raw_http import wait_until
from sandbox_processes import PreparedStore, SandboxProcess, StartSandbox, block_specs
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.cold_start import ActivationSettings
from faasmoe_router.dispatch.fanout import DispatchTimeouts
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.overflow import OverflowFunctions, is_memory_limited
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import StoreUnreadable

TOKEN = "a-token"
PATIENT = DispatchTimeouts(120.0, 120.0, 120.0)  # for a busy machine
N_ROWS = 6


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="faasmoe-") as folder:
        yield Path(folder) / "near"


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


@pytest.fixture(scope="module")
def whole(sandbox: StartSandbox, folder: Path, store: Store) -> Iterator[RoutingTable]:
    """A table in which every function has an address."""
    with sandbox(capacity=100, token=TOKEN, socket_dir=folder) as server:
        assert isinstance(server, SandboxProcess)
        yield server.attach_blocks(store, 3)


@pytest.fixture(scope="module")
def half(whole: RoutingTable) -> RoutingTable:
    """The same table with every other function missing."""
    entries = tuple(
        entry if i % 2 else FunctionEndpoints(entry.spec) for i, entry in enumerate(whole.functions)
    )
    return RoutingTable(whole.model_digest, 0, entries)


@pytest.fixture(params=[True, False], ids=["mailboxes", "http"])
def dispatcher(
    request: pytest.FixtureRequest, store: Store, half: RoutingTable, folder: Path
) -> Iterator[Dispatcher]:
    def never_wait(names: object) -> None:
        pytest.fail(f"got a request for the activation of {names}")

    dispatcher = Dispatcher(
        store,
        half,
        token=TOKEN,
        metrics=DispatchMetrics(),
        timeouts=PATIENT,
        activation=ActivationSettings(never_wait, timeout_s=60.0),
        socket_dir=folder,
        mailbox=request.param,
        computes_overflow=True,
    )
    yield dispatcher
    dispatcher.close()


def run(dispatcher: Dispatcher, store: Store) -> list[Tensor]:
    """Return each layer's output, [T, H]."""
    layers = store.manifest.layers
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N_ROWS, layers[0].hidden_size, generator=generator)  # [T, H]
    scores = torch.rand(N_ROWS, layers[0].num_experts, generator=generator)  # [T, E]
    weight, index = scores.topk(layers[0].top_k)  # [T, k]
    return [dispatcher.compute(i, hidden, index, weight) for i in range(len(layers))]


def expected(store: Store, whole: RoutingTable) -> list[Tensor]:
    dispatcher = Dispatcher(store, whole, token=TOKEN, timeouts=PATIENT)
    try:
        return run(dispatcher, store)
    finally:
        dispatcher.close()


def overflow_of(dispatcher: Dispatcher) -> OverflowFunctions:
    overflow = dispatcher._executor._overflow
    assert overflow is not None
    return overflow


def test_missing_functions_are_computed_here_with_the_same_result(
    dispatcher: Dispatcher, store: Store, whole: RoutingTable, half: RoutingTable
) -> None:
    first = run(dispatcher, store)
    missing = [entry for entry in half.functions if not entry.addresses]
    wait_until(lambda: len(overflow_of(dispatcher).mapped) == len(missing))
    mapped = run(dispatcher, store)
    assert dispatcher.load.local_calls == 0  # not the last resort
    for outputs in (first, mapped):
        for found, wanted in zip(outputs, expected(store, whole), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_mapped_functions_take_the_native_path(
    dispatcher: Dispatcher, store: Store, half: RoutingTable
) -> None:
    if dispatcher.native is None:
        pytest.skip("no native path without mailboxes or without the kernel library")
    missing = [entry for entry in half.functions if not entry.addresses]
    native = dispatcher.native
    run(dispatcher, store)
    wait_until(lambda: len(overflow_of(dispatcher).mapped) == len(missing))
    wait_until(lambda: len(native.connector.mailboxes()) == 1)
    run(dispatcher, store)  # publishes the routes
    layers_before = native._calls.left().layers
    run(dispatcher, store)
    assert native._calls.left().layers - layers_before == len(store.manifest.layers)


def test_a_function_is_released_once_it_has_an_address(
    dispatcher: Dispatcher, store: Store, whole: RoutingTable, half: RoutingTable
) -> None:
    run(dispatcher, store)
    overflow = overflow_of(dispatcher)
    missing = [entry.spec for entry in half.functions if not entry.addresses]
    wait_until(lambda: set(overflow.mapped) == set(missing))
    found = next(e for e in whole.functions if e.spec == missing[0])
    dispatcher.update_addresses(1, {found.spec.id: found.addresses})
    assert set(overflow.mapped) == set(missing[1:])
    run(dispatcher, store)
    dispatcher.update_addresses(2, {found.spec.id: ()})
    run(dispatcher, store)
    wait_until(lambda: set(overflow.mapped) == set(missing))


def test_a_model_at_zero_maps_nothing(dispatcher: Dispatcher, store: Store) -> None:
    run(dispatcher, store)
    overflow = overflow_of(dispatcher)
    wait_until(lambda: bool(overflow.mapped))
    dispatcher.update_addresses(1, dict.fromkeys(dispatcher.routing.entries, ()))
    assert not overflow.mapped
    run(dispatcher, store)  # a request at zero is computed here
    dispatcher.update_addresses(2, dict.fromkeys(dispatcher.routing.entries, ()))
    assert not overflow.mapped


def test_a_store_that_is_gone_is_reported(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store.path, copy)
    lost = Store.open(copy)
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(lost, 2))
    table = RoutingTable(lost.manifest.digest, 0, entries)
    dispatcher = Dispatcher(lost, table, computes_overflow=True)
    shutil.rmtree(copy)
    try:
        with pytest.raises(StoreUnreadable):
            run(dispatcher, lost)
    finally:
        dispatcher.close()


def test_a_release_before_the_mapping_began_keeps_it_from_mapping(
    store: Store, half: RoutingTable, whole: RoutingTable
) -> None:
    overflow = OverflowFunctions(store)
    overflow.start_pass(RoutingIndex.from_table(half, store))
    overflow.release(RoutingIndex.from_table(whole, store))
    overflow._mapping_executor.shutdown(wait=True)
    assert not overflow.mapped
    assert not overflow.selection()


def test_a_limit_matters_only_below_the_experts_size(store: Store) -> None:
    layers = store.manifest.layers
    n_bytes = sum(layer.expert_bytes * layer.num_experts for layer in layers)
    assert not is_memory_limited(store, None)
    assert not is_memory_limited(store, n_bytes)
    assert is_memory_limited(store, n_bytes - 1)
