"""Which functions are called natively: pure decisions over addresses, mailboxes and health."""

import numpy as np

from faasmoe_contracts.routing_table import FunctionEndpoints, FunctionSpec
from faasmoe_kernels.layer_calls import MAX_REPLICAS, LayerRoutes, Route
from faasmoe_router.dispatch.native_routes import (
    FIRST_SUSPENSION_S,
    MAX_SUSPENSION_S,
    FunctionNumbers,
    Suspensions,
    build_routes,
)
from faasmoe_router.dispatch.routing import LayerRouting, RoutingIndex

SPECS = (FunctionSpec("a", (0,), (0, 1)), FunctionSpec("b", (0,), (2, 3)))
MAILBOXES = {"127.0.0.1:1": 11, "127.0.0.1:2": 12}


def routing(*addresses: tuple[str, ...]) -> RoutingIndex:
    """One layer of two functions with these addresses."""
    entries = tuple(FunctionEndpoints(s, a) for s, a in zip(SPECS, addresses, strict=True))
    layer = LayerRouting(np.array([0, 0, 1, 1], dtype=np.int32), entries)
    thresholds = {spec.id: 1 for spec in SPECS}
    return RoutingIndex(1, (layer,), {e.spec.id: e for e in entries}, thresholds)


def routes(
    index: RoutingIndex,
    *,
    excluded: frozenset[str] = frozenset(),
    suspended: tuple[str, int] | None = None,
    local: dict[tuple[int, FunctionSpec], int] | None = None,
) -> tuple[Route, ...]:
    layers: list[LayerRoutes] = build_routes(
        index,
        mailboxes=MAILBOXES,
        excluded=lambda _: excluded,
        is_suspended=lambda address, layer: (address, layer) == suspended,
        local=local or {},
        numbers=FunctionNumbers(),
    )
    (layer,) = layers
    assert layer.n_experts == 4
    return layer.routes


def test_functions_with_mailboxes_at_all_addresses_are_called_natively() -> None:
    index = routing(("127.0.0.1:1", "127.0.0.1:2"), ("127.0.0.1:2",))
    assert routes(index) == (Route(0, "a", (11, 12)), Route(1, "b", (12,)))


def test_replica_on_another_machine_leaves_its_function_to_http() -> None:
    index = routing(("127.0.0.1:1", "10.0.0.1:1"), ("127.0.0.1:2",))
    assert [r.mailboxes for r in routes(index)] == [(), (12,)]
    excluded = frozenset({"10.0.0.1:1"})
    assert [r.mailboxes for r in routes(index, excluded=excluded)] == [(11,), (12,)]


def test_missing_ejected_and_suspended_functions_are_left_to_http() -> None:
    index = routing((), ("127.0.0.1:2",))
    assert [r.mailboxes for r in routes(index)] == [(), (12,)]
    assert [r.mailboxes for r in routes(index, excluded=frozenset(MAILBOXES))] == [(), ()]
    assert [r.mailboxes for r in routes(index, suspended=("127.0.0.1:2", 0))] == [(), ()]
    assert [r.mailboxes for r in routes(index, suspended=("127.0.0.1:2", 1))] == [(), (12,)]


def test_more_replicas_than_a_route_holds_are_left_to_http() -> None:
    index = routing(("127.0.0.1:1",) * (MAX_REPLICAS + 1), ("127.0.0.1:2",))
    assert [r.mailboxes for r in routes(index)] == [(), (12,)]


def test_functions_of_this_process_have_their_handle() -> None:
    index = routing(("127.0.0.1:1",), ("127.0.0.1:2",))
    assert routes(index, local={(0, SPECS[1]): 7})[1] == Route(1, "b", (12,), 7)


def test_numbers_are_never_used_again() -> None:
    numbers = FunctionNumbers()
    assert [numbers.number(name) for name in ("a", "b", "a")] == [0, 1, 0]
    assert dict(numbers.items()) == {"a": 0, "b": 1}
    assert len(numbers) == 2


def test_suspensions_double_and_expire() -> None:
    suspensions = Suspensions()
    now_s, delay_s = 100.0, FIRST_SUSPENSION_S
    while delay_s < MAX_SUSPENSION_S:
        suspensions.suspend("x:1", 3, now_s)
        version = suspensions.version
        suspensions.expire(now_s + delay_s - 0.01)
        assert suspensions.is_suspended("x:1", 3)
        assert not suspensions.is_suspended("x:1", 2)
        assert suspensions.version == version
        now_s += delay_s
        suspensions.expire(now_s)
        assert not suspensions.is_suspended("x:1", 3)
        assert suspensions.version == version + 1
        delay_s *= 2


def test_suspensions_of_removed_addresses_are_forgotten() -> None:
    suspensions = Suspensions()
    for address in ("x:1", "x:2"):
        suspensions.suspend(address, 0, 100.0)
    suspensions.retain({"x:2"})
    assert not suspensions.is_suspended("x:1", 0)
    assert suspensions.is_suspended("x:2", 0)
    suspensions.suspend("x:1", 0, 100.0)
    suspensions.expire(100.0 + FIRST_SUSPENSION_S)
    assert not suspensions.is_suspended("x:1", 0)
