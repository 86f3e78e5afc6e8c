"""Local fallback: how many functions it covers, and that it verifies their bytes."""

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

N_TOKENS = 50  # need all functions
ADDRESS = ("127.0.0.1:1",)


class FallbackHarness:
    """A dispatcher of a private store with one function per expert, all with an address."""

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

    def set_addresses(self, names: Sequence[str], addresses: tuple[str, ...] = ()) -> None:
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
def harness(prepared_store: PreparedStore, tmp_path: Path) -> FallbackHarness:
    shutil.copytree(prepared_store("mixtral").path, tmp_path / "store")
    return FallbackHarness(Store.open(tmp_path / "store"))


@pytest.mark.parametrize(
    ("n_missing", "n_functions", "is_allowed"),
    [
        pytest.param(1, 1, False, id="all of one"),
        pytest.param(1, 2, True, id="one of few"),
        pytest.param(2, 15, False, id="above the fraction"),
        pytest.param(2, 16, True, id="at the fraction"),
        pytest.param(72, 72, False, id="all"),
        pytest.param(9, 72, True, id="at the fraction of many"),
        pytest.param(10, 72, False, id="above the fraction of many"),
    ],
)
def test_the_fallback_covers_a_fraction_of_the_functions_only(
    n_missing: int, n_functions: int, is_allowed: bool
) -> None:
    assert is_fallback_allowed(n_missing, n_functions) is is_allowed


def test_a_covered_function_is_not_missing_until_it_had_an_address(
    harness: FallbackHarness,
) -> None:
    lost = harness.names[0]
    harness.set_addresses([lost])
    assert not harness.is_complete
    assert harness.enable()
    assert harness.is_complete
    assert harness.fallback.missing_for(N_TOKENS) == []
    assert (
        harness.metric("local_fallback_functions")
        == harness.metric("local_fallback_admissions_total")
        == 1
    )
    harness.set_addresses([lost], ADDRESS)
    assert harness.metric("local_fallback_functions") == 0
    harness.set_addresses([lost])
    assert harness.fallback.missing_for(N_TOKENS) == [lost]


def test_a_function_lost_later_is_missing(harness: FallbackHarness) -> None:
    first, second = harness.names[:2]
    harness.set_addresses([first])
    assert harness.enable()
    harness.set_addresses([second])
    assert harness.fallback.missing_for(N_TOKENS) == [second]


def test_the_fraction_limits_all_covered_functions_together(harness: FallbackHarness) -> None:
    n_allowed = len(harness.names) // 8
    harness.set_addresses(harness.names[:n_allowed])
    assert harness.enable()
    harness.set_addresses(harness.names[n_allowed : n_allowed + 1])
    assert not harness.enable()


def test_scaling_to_zero_ends_the_fallback(
    harness: FallbackHarness,
) -> None:
    harness.set_addresses(harness.names[:1])
    assert harness.enable()
    harness.set_addresses(harness.names)
    assert harness.fallback.missing_for(N_TOKENS) == harness.names
    assert harness.metric("local_fallback_functions") == 0


def test_a_function_corrupted_in_the_local_store_is_rejected_until_it_is_repaired(
    harness: FallbackHarness,
) -> None:
    layer = harness.store.manifest.layers[0]
    path = harness.store.path / layer.file
    last = path.stat().st_size - 1  # in the layer's last expert

    def flip() -> None:
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, last)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), last)

    flip()
    harness.set_addresses([harness.names[layer.num_experts - 1]])
    with pytest.raises(StoreCorrupted, match="corrupted in every copy") as refused:
        harness.enable()
    assert str(path) not in str(refused.value)  # clients must not see paths
    assert not harness.is_complete
    flip()
    assert harness.enable()


def test_a_removed_store_disables_the_fallback(harness: FallbackHarness) -> None:
    harness.set_addresses(harness.names[:1])
    shutil.rmtree(harness.store.path)
    assert not harness.enable()


def test_concurrent_callers_share_one_check(harness: FallbackHarness) -> None:
    may_check = threading.Event()
    check = harness.check

    def wait_and_check(specs: Sequence[FunctionSpec]) -> None:
        may_check.wait(120)
        check(specs)

    harness.fallback = LocalFallback(
        lambda: harness.dispatcher.routing, check=wait_and_check, metrics=ControlLinkMetrics()
    )
    harness.set_addresses(harness.names[:1])

    async def enable_concurrently() -> list[bool]:
        tasks = [asyncio.create_task(harness.fallback.enable_for(N_TOKENS)) for _ in range(8)]
        await asyncio.sleep(0)
        may_check.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(enable_concurrently()) == [True] * 8
    assert harness.checks == [harness.names[:1]]
