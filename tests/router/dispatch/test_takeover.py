"""Which functions the router goes on computing in place of their sandboxes, and for how long."""

from __future__ import annotations

import math
import time
from types import MappingProxyType
from typing import cast

import numpy as np
import pytest

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec
from faasmoe_expert.functions import ExpertFunction
from faasmoe_expert.functions.verification import OutOfTime
from faasmoe_router.dispatch import takeover
from faasmoe_router.dispatch.cold_start import LOST_S, ActivationSettings, ActivationWaiter
from faasmoe_router.dispatch.endpoint_health import EndpointHealth, ResilienceSettings
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.local_functions import LocalFunctions
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.routing import LayerRouting, RoutingIndex
from faasmoe_router.dispatch.takeover import TakenOverFunctions
from faasmoe_router.dispatch.transport import ConnectError
from faasmoe_router.errors import StoreCorrupted

NEAR, FAR = "127.0.0.1:1", "127.0.0.1:2"
COMPUTED, OTHER = FunctionSpec("a", (0, 1), (0, 1)), FunctionSpec("b", (0, 1), (2, 3))
KEYS = {(0, COMPUTED), (1, COMPUTED)}


class Computed:
    """Functions that were computed in this process."""

    def __init__(self, *specs: FunctionSpec) -> None:
        self.functions = {spec: cast("ExpertFunction", object()) for spec in specs}
        self.damaged: set[FunctionSpec] = set()

    def mapped(self) -> MappingProxyType[FunctionSpec, ExpertFunction]:
        return MappingProxyType(self.functions)

    def map(self, spec: FunctionSpec, *, until_s: float = math.inf) -> ExpertFunction:
        if spec in self.damaged:
            raise StoreCorrupted("damaged")
        return self.functions.setdefault(spec, cast("ExpertFunction", object()))


def routing(*addresses: str) -> RoutingIndex:
    """Two layers of two functions, both at these addresses."""
    entries = tuple(FunctionEndpoints(spec, addresses) for spec in (COMPUTED, OTHER))
    layer = LayerRouting(np.array([0, 0, 1, 1], dtype=np.int32), entries)
    return RoutingIndex(1, (layer, layer), {e.spec.id: e for e in entries}, {"a": 1, "b": 1})


@pytest.fixture
def health() -> EndpointHealth:
    return EndpointHealth(ResilienceSettings(), DispatchMetrics(), may_be_starting=False)


def taken_over(
    health: EndpointHealth, computed: Computed, waiter: ActivationWaiter | None = None
) -> TakenOverFunctions:
    return TakenOverFunctions(
        cast("LocalFunctions", computed),
        health=health,
        was_lost=(lambda *_: False) if waiter is None else waiter.was_lost,
        request=(lambda *_: None) if waiter is None else waiter.request_replacements,
    )


def test_function_is_taken_over_while_all_of_its_addresses_are_ejected(
    health: EndpointHealth,
) -> None:
    functions = taken_over(health, Computed(COMPUTED))
    index = routing(NEAR, FAR)
    assert functions.selection(index, 0.0) == {}
    health.record_failure(NEAR, ConnectError("refused"), 0.0)
    assert functions.selection(index, 0.0) == {}
    health.record_failure(FAR, ConnectError("refused"), 0.0)
    selection = functions.selection(index, 0.0)
    assert selection.keys() == KEYS
    assert functions.selection(index, 0.1) is selection
    assert functions.selection(routing(NEAR, "127.0.0.1:3"), 0.2) == {}  # replaced


def test_only_what_was_computed_and_is_still_the_same_function_is_taken_over(
    health: EndpointHealth,
) -> None:
    computed = Computed()
    functions = taken_over(health, computed)
    health.record_failure(NEAR, ConnectError("refused"), 0.0)
    assert functions.selection(routing(NEAR), 0.0) == {}
    other_block = FunctionSpec("a", (0, 1), (0,))
    computed.functions = {other_block: cast("ExpertFunction", object())}
    assert functions.selection(routing(NEAR), 0.0) == {}
    computed.functions[COMPUTED] = cast("ExpertFunction", object())
    assert functions.selection(routing(NEAR), 0.0).keys() == KEYS
    assert functions.mapped == {other_block, COMPUTED}


def test_function_without_address_is_taken_over_for_a_while_after_its_loss(
    health: EndpointHealth,
) -> None:
    waiter = ActivationWaiter(
        ActivationSettings(lambda names: None),
        health=health,
        load=LoadMeter(),
        metrics=DispatchMetrics(),
    )
    functions = taken_over(health, Computed(COMPUTED), waiter)
    assert functions.selection(routing(), 100.0) == {}  # at zero, not lost: calls wait for it
    waiter.record_routing(routing(NEAR), routing(), 100.0)
    assert functions.selection(routing(), 100.0 + LOST_S / 2).keys() == KEYS
    assert functions.selection(routing(), 100.0 + LOST_S) == {}


def test_function_stays_taken_over_until_a_mailbox_of_its_replacement_is_open(
    health: EndpointHealth,
) -> None:
    waiter = ActivationWaiter(
        ActivationSettings(lambda names: None),
        health=health,
        load=LoadMeter(),
        metrics=DispatchMetrics(),
    )
    functions = taken_over(health, Computed(COMPUTED), waiter)
    assert functions.selection(routing(FAR), 100.0, {FAR}) == {}  # it has not lost any
    waiter.record_routing(routing(NEAR), routing(NEAR, FAR), 100.0)
    assert functions.selection(routing(NEAR, FAR), 100.0, {NEAR, FAR}) == {}
    waiter.record_routing(routing(NEAR), routing(FAR), 100.0)
    assert functions.selection(routing(FAR), 100.0, {FAR}).keys() == KEYS
    assert functions.selection(routing(FAR), 100.0, {NEAR}) == {}
    assert functions.selection(routing(FAR), 100.0 + LOST_S, {FAR}) == {}


def test_function_is_taken_over_if_what_is_not_ejected_has_no_mailbox_yet(
    health: EndpointHealth,
) -> None:
    functions = taken_over(health, Computed(COMPUTED))
    health.record_exited(NEAR, 0.0)
    assert functions.selection(routing(NEAR, FAR), 0.0, {FAR}).keys() == KEYS
    assert functions.selection(routing(NEAR, FAR), 0.0, set()) == {}


def test_functions_that_calls_wait_for_are_not_taken_over_before(health: EndpointHealth) -> None:
    waiter = ActivationWaiter(
        ActivationSettings(lambda names: None, replacement_timeout_s=2.0),
        health=health,
        load=LoadMeter(),
        metrics=DispatchMetrics(),
    )
    computed = cast("LocalFunctions", Computed(COMPUTED))
    functions = TakenOverFunctions(
        computed,
        health=health,
        was_lost=waiter.was_lost,
        request=waiter.request_replacements,
        wait_s=2.0,
    )
    health.record_exited(NEAR, 100.0)
    assert functions.selection(routing(NEAR), 101.0) == {}
    assert functions.selection(routing(NEAR), 102.0).keys() == KEYS
    waiter.record_routing(routing(NEAR), routing(), 103.0)
    assert functions.selection(routing(), 104.0) == {}
    assert functions.selection(routing(), 105.0).keys() == KEYS


def test_functions_of_a_lost_sandbox_are_mapped_together(health: EndpointHealth) -> None:
    computed = Computed()
    functions = taken_over(health, computed)
    functions.map_lost(routing(NEAR), 0.0)
    assert functions.mapped == set()
    health.record_failure(NEAR, ConnectError("refused"), 0.0)
    functions.map_lost(routing(NEAR, FAR), 0.0)
    assert functions.mapped == set()  # another sandbox has them
    functions.map_lost(routing(NEAR), 0.0)
    assert functions.mapped == {COMPUTED, OTHER}


def test_mapping_ends_with_its_budget_and_with_what_cannot_be_mapped(
    health: EndpointHealth, monkeypatch: pytest.MonkeyPatch
) -> None:
    health.record_failure(NEAR, ConnectError("refused"), 0.0)
    computed = Computed()
    functions = taken_over(health, computed)
    computed.damaged.add(COMPUTED)
    functions.map_lost(routing(NEAR), 0.0)
    assert functions.mapped == set()
    computed.damaged.clear()
    monkeypatch.setattr(takeover, "MAP_BUDGET_S", -1.0)
    functions.map_lost(routing(NEAR), 0.0)
    assert functions.mapped == set()


def test_replacements_of_what_is_taken_over_are_requested_at_once_and_every_second(
    health: EndpointHealth,
) -> None:
    requested: list[str] = []
    waiter = ActivationWaiter(
        ActivationSettings(requested.extend),
        health=health,
        load=LoadMeter(),
        metrics=DispatchMetrics(),
    )
    functions = taken_over(health, Computed(COMPUTED), waiter)
    health.record_exited(NEAR, 100.0)
    assert functions.selection(routing(NEAR), 100.0)
    functions.request_replacements(routing(NEAR), 100.0)
    assert requested == []  # it still has an address
    waiter.record_routing(routing(NEAR), routing(), 101.0)
    for now_s in (101.0, 101.5, 102.0):
        assert functions.selection(routing(), now_s)
        functions.request_replacements(routing(), now_s)
    assert requested == [COMPUTED.id, COMPUTED.id]
    assert not functions.selection(routing(FAR), 103.0)
    functions.request_replacements(routing(FAR), 103.0)
    assert requested == [COMPUTED.id, COMPUTED.id]
    assert not waiter.absences.is_any_missing  # no call has missed it


def test_mapping_that_reads_many_bytes_ends_with_its_budget(health: EndpointHealth) -> None:
    class Unverified(Computed):
        def map(self, spec: FunctionSpec, *, until_s: float = math.inf) -> ExpertFunction:
            assert until_s < time.monotonic() + takeover.MAP_BUDGET_S
            raise OutOfTime

    health.record_failure(NEAR, ConnectError("refused"), 0.0)
    functions = taken_over(health, Unverified())
    functions.map_lost(routing(NEAR), 0.0)
    assert functions.mapped == set()
