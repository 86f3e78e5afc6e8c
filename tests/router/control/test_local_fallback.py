"""What the router computes itself because it cannot be had: how much, and only from sound bytes."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.control.local_fallback import LocalFallback, is_fallback_allowed
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.errors import StoreCorrupted

N_TOKENS = 50  # need every function
ADDRESS = ("127.0.0.1:1",)


class FallbackHarness:
    """A dispatcher over a store of its own, cut into single experts, all of them at an address."""

    def __init__(self, store: Store) -> None:
        self.store = store
        specs = block_specs(store, 1)
        table = tuple(FunctionEndpoints(spec, ADDRESS) for spec in specs)
        self.names = [spec.id for spec in specs]
        self.dispatcher = Dispatcher(store, RoutingTable(store.manifest.digest, 0, table))
        self.checks: list[list[str]] = []
        self.registry = CollectorRegistry()
        self.fallback = LocalFallback(
            lambda: self.dispatcher.routing,
            check=self.check,
            metrics=ControlLinkMetrics(self.registry),
        )

    def check(self, specs: Sequence[FunctionSpec]) -> None:
        self.checks.append([spec.id for spec in specs])
        self.dispatcher.check_local(specs)

    def move(self, names: Sequence[str], addresses: tuple[str, ...] = ()) -> None:
        version = self.dispatcher.routing.version + 1
        self.dispatcher.update_addresses(version, dict.fromkeys(names, addresses))
        self.fallback.on_table_changed()

    def enable(self) -> bool:
        return asyncio.run(self.fallback.enable_for(N_TOKENS))

    @property
    def is_complete(self) -> bool:
        return self.fallback.activated_below_tokens > N_TOKENS

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"faasmoe_router_{name}")


@pytest.fixture
def world(prepared_store: PreparedStore, tmp_path: Path) -> FallbackHarness:
    shutil.copytree(prepared_store("mixtral").path, tmp_path / "store")
    return FallbackHarness(Store.open(tmp_path / "store"))


@pytest.mark.parametrize(
    ("n_missing", "n_functions", "may"),
    [
        pytest.param(1, 1, False, id="nothing was started"),
        pytest.param(1, 2, True, id="one of few"),
        pytest.param(2, 15, False, id="more than a part"),
        pytest.param(2, 16, True, id="a part"),
        pytest.param(72, 72, False, id="everything"),
        pytest.param(9, 72, True, id="a part of many"),
        pytest.param(10, 72, False, id="more than a part of many"),
    ],
)
def test_the_router_stands_in_for_a_part_only(n_missing: int, n_functions: int, may: bool) -> None:
    assert is_fallback_allowed(n_missing, n_functions) is may


def test_what_is_stood_in_for_is_not_waited_for_until_it_has_been_there(
    world: FallbackHarness,
) -> None:
    lost = world.names[0]
    world.move([lost])
    assert not world.is_complete
    assert world.enable()
    assert world.is_complete
    assert world.fallback.missing_for(N_TOKENS) == []
    assert (
        world.metric("local_fallback_functions")
        == world.metric("local_fallback_admissions_total")
        == 1
    )
    world.move([lost], ADDRESS)
    assert world.metric("local_fallback_functions") == 0
    world.move([lost])
    assert world.fallback.missing_for(N_TOKENS) == [lost]


def test_what_is_lost_besides_is_waited_for(world: FallbackHarness) -> None:
    first, second = world.names[:2]
    world.move([first])
    assert world.enable()
    world.move([second])
    assert world.fallback.missing_for(N_TOKENS) == [second]


def test_more_than_a_part_is_refused_however_it_comes_together(world: FallbackHarness) -> None:
    n_most = len(world.names) // 8
    world.move(world.names[:n_most])
    assert world.enable()
    world.move(world.names[n_most : n_most + 1])
    assert not world.enable()


def test_when_everything_goes_to_zero_nothing_is_stood_in_for_any_more(
    world: FallbackHarness,
) -> None:
    world.move(world.names[:1])
    assert world.enable()
    world.move(world.names)
    assert world.fallback.missing_for(N_TOKENS) == world.names
    assert world.metric("local_fallback_functions") == 0


def test_a_block_that_is_damaged_here_too_is_refused_by_another_error_until_it_is_mended(
    world: FallbackHarness,
) -> None:
    layer = world.store.manifest.layers[0]
    path = world.store.path / layer.file
    last = path.stat().st_size - 1  # of the layer's last expert

    def flip() -> None:
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, last)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), last)

    flip()
    world.move([world.names[layer.num_experts - 1]])
    with pytest.raises(StoreCorrupted, match="corrupted in every copy") as refused:
        world.enable()
    assert str(path) not in str(refused.value)  # which is nothing for clients
    assert not world.is_complete
    flip()
    assert world.enable()


def test_a_store_that_is_gone_cannot_stand_in(world: FallbackHarness) -> None:
    world.move(world.names[:1])
    shutil.rmtree(world.store.path)
    assert not world.enable()


def test_however_many_ask_the_bytes_are_read_once(world: FallbackHarness) -> None:
    go = threading.Event()
    check = world.check

    def wait_and_check(specs: Sequence[FunctionSpec]) -> None:
        go.wait(10)
        check(specs)

    world.fallback = LocalFallback(
        lambda: world.dispatcher.routing, check=wait_and_check, metrics=ControlLinkMetrics()
    )
    world.move(world.names[:1])

    async def ask() -> list[bool]:
        asking = [asyncio.create_task(world.fallback.enable_for(N_TOKENS)) for _ in range(8)]
        await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*asking)

    assert asyncio.run(ask()) == [True] * 8
    assert world.checks == [world.names[:1]]
