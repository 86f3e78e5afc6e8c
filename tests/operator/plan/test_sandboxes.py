"""Plans checked by hand; by default a sandbox holds one function and the warm pool is empty."""

from __future__ import annotations

from typing import Any

import pytest

from faasmoe_operator.errors import PlanError
from faasmoe_operator.plan.actions import Action, ActionReason, Attach, Create, Delete, Detach
from faasmoe_operator.plan.fleet import (
    Assignment,
    AssignmentState,
    FleetSettings,
    FunctionDemand,
    ObservedSandbox,
    SandboxShape,
    SandboxState,
)
from faasmoe_operator.plan.sandboxes import SandboxPlan, plan_sandboxes

NEW, OLD = "new", "old"
NOW = 1000.0

DEMAND = ActionReason.DEMAND
POOL = ActionReason.WARM_POOL
TEMPLATE = ActionReason.TEMPLATE_CHANGED
SURPLUS = ActionReason.SURPLUS
IDLE = ActionReason.IDLE

ATTACHED = AssignmentState.ATTACHED
ATTACHING = AssignmentState.ATTACHING
DETACHING = AssignmentState.DETACHING


def sandbox(
    name: str,
    *functions: str | Assignment,
    state: SandboxState = SandboxState.READY,
    template: str = NEW,
    created_at: float = 900.0,
    shape: SandboxShape | None = None,
) -> ObservedSandbox:
    assignments = tuple(Assignment(f) if isinstance(f, str) else f for f in functions)
    return ObservedSandbox(name, state, template, created_at, assignments, shape)


def starting(name: str, *, created_at: float = 990.0) -> ObservedSandbox:
    return sandbox(name, state=SandboxState.STARTING, created_at=created_at)


def plan(
    *sandboxes: ObservedSandbox, want: dict[str, int] | None = None, **settings: Any
) -> SandboxPlan:
    demands = [FunctionDemand(function, replicas) for function, replicas in (want or {}).items()]
    return plan_with(demands, *sandboxes, **settings)


def plan_with(
    demands: list[FunctionDemand], *sandboxes: ObservedSandbox, **settings: Any
) -> SandboxPlan:
    fleet_settings = FleetSettings(**{"template_hash": NEW, "warm_pool": 0, **settings})
    return plan_sandboxes(fleet_settings, demands, sandboxes=sandboxes, now=NOW)


def actions(
    *sandboxes: ObservedSandbox, want: dict[str, int] | None = None, **settings: Any
) -> list[Action]:
    return list(plan(*sandboxes, want=want, **settings).actions)


def test_no_demand_and_no_pool_creates_no_sandbox() -> None:
    assert actions(want={"f": 0}) == []


def test_no_demand_and_no_pool_deletes_all_sandboxes() -> None:
    assert actions(sandbox("a"), sandbox("b")) == [Delete("a", IDLE), Delete("b", IDLE)]


def test_empty_fleet_creates_a_sandbox_for_each_replica_and_the_pool() -> None:
    assert actions(want={"f": 2, "g": 1}, warm_pool=1) == [Create(3, DEMAND), Create(1, POOL)]


def test_warm_pool_is_used_first_and_refilled_in_the_same_pass() -> None:
    got = actions(sandbox("a"), sandbox("b"), want={"f": 1}, warm_pool=2)
    assert got == [Attach("a", "f", DEMAND), Create(1, POOL)]


def test_full_pool_needs_no_action() -> None:
    assert actions(sandbox("a", "f"), sandbox("b"), want={"f": 1}, warm_pool=1) == []


def test_starting_sandbox_counts_towards_the_pool() -> None:
    assert actions(starting("a"), warm_pool=1) == []


def test_starting_sandbox_is_never_deleted() -> None:
    assert actions(starting("a"), starting("b")) == []


def test_deletes_the_newest_ready_sandboxes_beyond_the_pool() -> None:
    got = actions(
        sandbox("a", created_at=3),
        sandbox("b", created_at=1),
        sandbox("c", created_at=2),
        starting("d"),
        warm_pool=1,
    )
    assert got == [Delete("c", IDLE), Delete("a", IDLE)]


def test_missing_replica_waits_for_a_starting_sandbox() -> None:
    assert actions(starting("a"), want={"f": 1}) == []


def test_reserved_sandbox_does_not_count_towards_the_pool() -> None:
    # The starting sandbox is reserved for f; the pool needs one more.
    assert actions(starting("a"), want={"f": 1}, warm_pool=1) == [Create(1, POOL)]


def test_missing_replica_waits_for_capacity_that_becomes_free() -> None:
    detaching = Assignment("f", DETACHING)
    assert actions(sandbox("a", detaching), want={"f": 0, "g": 1}) == []
    # Capacity that becomes free in this pass.
    got = actions(sandbox("a", "f"), want={"f": 0, "g": 1})
    assert got == [Detach("a", "f", SURPLUS)]


def test_sandbox_that_becomes_empty_counts_towards_the_pool_and_is_not_deleted() -> None:
    assert actions(sandbox("a", Assignment("f", DETACHING)), warm_pool=1) == []
    assert actions(sandbox("a", Assignment("f", DETACHING)), warm_pool=0) == []


def test_places_first_replicas_before_second_ones_in_order_of_demand() -> None:
    got = actions(sandbox("a"), sandbox("b"), sandbox("c"), want={"hot": 3, "cold": 1})
    assert got == [
        Attach("a", "hot", DEMAND),
        Attach("b", "cold", DEMAND),
        Attach("c", "hot", DEMAND),
        Create(1, DEMAND),
    ]


def test_replicas_of_a_function_never_share_a_sandbox() -> None:
    got = actions(sandbox("a", "f"), want={"f": 2}, shape=SandboxShape(capacity=4))
    assert got == [Create(1, DEMAND)]
    got = actions(sandbox("a", "f"), sandbox("b"), want={"f": 3}, shape=SandboxShape(capacity=4))
    assert got == [Attach("b", "f", DEMAND), Create(1, DEMAND)]


def test_replica_never_shares_a_sandbox_with_a_detaching_one() -> None:
    detaching = sandbox("a", Assignment("f", DETACHING))
    assert actions(detaching, want={"f": 1}, shape=SandboxShape(capacity=4)) == []


def test_fills_sandboxes_in_use_before_empty_ones() -> None:
    got = actions(
        sandbox("a", created_at=1),
        sandbox("b", "x", created_at=2),
        sandbox("c", "y", "z", created_at=3),
        want={"f": 1, "g": 1, "h": 1, "x": 1, "y": 1, "z": 1},
        shape=SandboxShape(capacity=3),
        warm_pool=1,
    )
    assert got == [Attach("c", "f", DEMAND), Attach("b", "g", DEMAND), Attach("b", "h", DEMAND)]


def test_new_sandboxes_are_shared_up_to_their_capacity() -> None:
    # 5 functions of one replica and one of two: ceil(7 / 3) = 3 sandboxes.
    want = dict.fromkeys("abcde", 1) | {"f": 2}
    assert actions(want=want, shape=SandboxShape(capacity=3)) == [Create(3, DEMAND)]


def test_memory_limits_the_functions_of_a_sandbox() -> None:
    # 100 bytes: 60 + 30 fit, the other 60 does not.
    demands = [FunctionDemand("f", 1, 60), FunctionDemand("g", 1, 60), FunctionDemand("h", 1, 30)]
    shape = SandboxShape(capacity=4, memory_limit_bytes=100)
    got = plan_with(demands, sandbox("a"), shape=shape)
    assert got.actions == (
        Attach("a", "f", DEMAND),
        Attach("a", "h", DEMAND),
        Create(1, DEMAND),
    )


def test_memory_of_a_detaching_function_counts_as_used() -> None:
    shape = SandboxShape(capacity=4, memory_limit_bytes=100)
    full = sandbox("a", Assignment("f", DETACHING, memory_bytes=60))
    assert plan_with([FunctionDemand("g", 1, 60)], full, shape=shape).actions == ()
    partly_free = sandbox("a", Assignment("f", DETACHING, memory_bytes=40))
    got = plan_with([FunctionDemand("g", 1, 60)], partly_free, shape=shape)
    assert got.actions == (Attach("a", "g", DEMAND),)


def test_reserved_capacity_is_not_given_to_another_function() -> None:
    # 60 of 100 bytes become free later. f (80) waits for them. g (30) would fit into the 40 bytes
    # that are free now, but then f would not fit later.
    partly_free = sandbox("a", Assignment("x", DETACHING, memory_bytes=60))
    demands = [FunctionDemand("f", 1, 80), FunctionDemand("g", 1, 30)]
    got = plan_with(demands, partly_free, shape=SandboxShape(capacity=4, memory_limit_bytes=100))
    assert got.actions == (Create(1, DEMAND),)
    # f (70) and g (30) fit together.
    demands = [FunctionDemand("f", 1, 70), FunctionDemand("g", 1, 30)]
    got = plan_with(demands, partly_free, shape=SandboxShape(capacity=4, memory_limit_bytes=100))
    assert got.actions == (Attach("a", "g", DEMAND),)


def test_function_larger_than_any_sandbox_is_unschedulable() -> None:
    got = plan_with(
        [FunctionDemand("f", 2, 101), FunctionDemand("g", 0, 101)], shape=SandboxShape(1, 100)
    )
    assert got == SandboxPlan((), unschedulable=("f",))


def test_larger_existing_sandbox_takes_what_a_new_one_cannot() -> None:
    large = sandbox("a", shape=SandboxShape(1, 200))
    got = plan_with([FunctionDemand("f", 2, 150)], large, shape=SandboxShape(1, 100))
    assert got == SandboxPlan((Attach("a", "f", DEMAND),), unschedulable=("f",))


def test_creates_are_limited_and_demand_comes_before_the_pool() -> None:
    want = dict.fromkeys("abcde", 1)
    assert actions(want=want, warm_pool=3, max_creates=4) == [Create(4, DEMAND)]
    assert actions(want=want, warm_pool=3, max_creates=7) == [Create(5, DEMAND), Create(2, POOL)]


def test_creates_nothing_while_creation_is_backed_off() -> None:
    assert actions(sandbox("a"), want={"f": 1, "g": 1}, warm_pool=2, max_creates=0) == [
        Attach("a", "f", DEMAND)
    ]


def test_detaches_the_least_recently_used_surplus_replicas() -> None:
    got = actions(
        sandbox("a", Assignment("f", last_used=30)),
        sandbox("b", Assignment("f", last_used=10)),
        sandbox("c", Assignment("f", last_used=20)),
        want={"f": 1},
    )
    assert got == [Detach("b", "f", SURPLUS), Detach("c", "f", SURPLUS)]


def test_attaching_replica_is_not_detached() -> None:
    got = actions(sandbox("a", Assignment("f", ATTACHING)), want={"f": 0})
    assert got == []
    # One is ready and one is desired: the other becomes surplus once it is ready.
    pair = [sandbox("a", "f"), sandbox("b", Assignment("f", ATTACHING))]
    assert actions(*pair, want={"f": 1}) == []


def test_attaching_replica_counts_as_a_replica() -> None:
    assert actions(sandbox("a", Assignment("f", ATTACHING)), want={"f": 1}) == []


def test_detaching_replica_does_not_count_as_a_replica() -> None:
    got = actions(sandbox("a", Assignment("f", DETACHING)), sandbox("b"), want={"f": 1})
    assert got == [Attach("b", "f", DEMAND)]


def test_unplanned_functions_are_detached() -> None:
    got = actions(sandbox("a", "stranger"), sandbox("b", "f"), want={"f": 1})
    assert got == [Detach("a", "stranger", ActionReason.NOT_PLANNED)]


def test_failed_sandbox_is_deleted_and_its_functions_are_placed_elsewhere() -> None:
    got = actions(
        sandbox("a", "f", "g", state=SandboxState.FAILED),
        sandbox("b"),
        want={"f": 1, "g": 1},
        warm_pool=1,
    )
    assert got == [
        Attach("b", "f", DEMAND),
        Create(1, DEMAND),
        Create(1, POOL),
        Delete("a", ActionReason.FAILED),
    ]


def test_sandbox_that_misses_its_start_deadline_is_replaced() -> None:
    settings: dict[str, Any] = {"warm_pool": 1, "start_deadline_s": 60.0}
    assert actions(starting("a", created_at=NOW - 60), **settings) == []
    assert actions(starting("a", created_at=NOW - 60.1), **settings) == [
        Create(1, POOL),
        Delete("a", ActionReason.START_TIMED_OUT),
    ]


def test_draining_sandbox_is_neither_used_nor_deleted_again() -> None:
    draining = sandbox("a", "f", state=SandboxState.DRAINING)
    assert actions(draining, want={"f": 1}) == [Create(1, DEMAND)]


def test_outdated_sandbox_is_replaced_without_interrupting_its_function() -> None:
    def step(*sandboxes: ObservedSandbox) -> list[Action]:
        return actions(*sandboxes, want={"f": 1})

    old = sandbox("a", "f", template=OLD, created_at=1)
    assert step(old) == [Create(1, TEMPLATE)]
    assert step(old, starting("b")) == []
    assert step(old, sandbox("b")) == [Attach("b", "f", TEMPLATE)]
    assert step(old, sandbox("b", Assignment("f", ATTACHING))) == []
    assert step(old, sandbox("b", "f")) == [Detach("a", "f", TEMPLATE)]
    detaching = sandbox("a", Assignment("f", DETACHING), template=OLD)
    assert step(detaching, sandbox("b", "f")) == []
    assert step(sandbox("a", template=OLD), sandbox("b", "f")) == [Delete("a", TEMPLATE)]
    assert step(sandbox("b", "f")) == []


def test_concurrent_replacements_are_limited() -> None:
    fleet = [sandbox(name, name.upper(), template=OLD) for name in "abcd"]
    want = dict.fromkeys("ABCD", 1)
    assert actions(*fleet, want=want, max_surge=2) == [Create(2, TEMPLATE)]
    attaching = sandbox("n", Assignment("A", ATTACHING))
    assert actions(*fleet, attaching, want=want, max_surge=2) == [Create(1, TEMPLATE)]
    assert actions(*fleet, attaching, want=want, max_surge=1) == []


def test_oldest_sandboxes_are_replaced_first() -> None:
    got = actions(
        sandbox("a", "f", template=OLD, created_at=5),
        sandbox("b", "g", template=OLD, created_at=4),
        sandbox("c"),
        want={"f": 1, "g": 1},
    )
    assert got == [Attach("c", "g", TEMPLATE)]


def test_missing_replica_is_placed_before_a_replacement() -> None:
    got = actions(sandbox("a", "f", template=OLD), sandbox("b"), want={"f": 1, "g": 1})
    assert got == [Attach("b", "g", DEMAND), Create(1, TEMPLATE)]


def test_function_completed_in_this_pass_gets_its_replacement_too() -> None:
    got = actions(sandbox("a", "f", template=OLD), sandbox("b"), sandbox("c"), want={"f": 2})
    assert got == [Attach("b", "f", DEMAND), Attach("c", "f", TEMPLATE)]


def test_attaching_replica_is_not_replaced() -> None:
    attaching = sandbox("a", Assignment("f", ATTACHING), template=OLD)
    assert actions(attaching, want={"f": 1}) == []


def test_outdated_empty_sandbox_stays_in_the_pool_until_a_new_one_is_ready() -> None:
    old = sandbox("a", template=OLD)
    assert actions(old, warm_pool=1) == [Create(1, POOL)]
    assert actions(old, starting("b"), warm_pool=1) == []
    assert actions(old, sandbox("b"), warm_pool=1) == [Delete("a", TEMPLATE)]


def test_outdated_empty_sandbox_is_used_if_no_current_one_is_ready() -> None:
    got = actions(sandbox("a", template=OLD), starting("b"), want={"f": 1}, warm_pool=1)
    assert got == [Attach("a", "f", DEMAND)]
    got = actions(sandbox("a", template=OLD), sandbox("b"), want={"f": 1})
    assert got == [Attach("b", "f", DEMAND), Delete("a", TEMPLATE)]


def test_surplus_replicas_in_outdated_sandboxes_are_detached_first() -> None:
    got = actions(
        sandbox("a", Assignment("f", last_used=99), template=OLD),
        sandbox("b", Assignment("f", last_used=1)),
        want={"f": 1},
    )
    assert got == [Detach("a", "f", TEMPLATE)]


def test_outdated_replica_without_demand_is_not_replaced() -> None:
    got = actions(sandbox("a", "f", template=OLD), want={"f": 0})
    assert got == [Detach("a", "f", SURPLUS)]


def test_function_too_large_for_the_new_template_keeps_its_sandbox() -> None:
    old = sandbox("a", "f", template=OLD)
    got = plan_with([FunctionDemand("f", 1, 101)], old, shape=SandboxShape(1, 100))
    assert got == SandboxPlan((), unschedulable=("f",))


def test_outdated_sandbox_is_filled_according_to_its_own_shape() -> None:
    old = sandbox("a", "f", template=OLD, shape=SandboxShape(capacity=1))
    got = actions(old, want={"f": 1, "g": 1}, shape=SandboxShape(capacity=4))
    # g does not fit in a, although it would in a new sandbox; f's replacement will share g's.
    assert got == [Create(1, DEMAND)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FleetSettings(NEW, warm_pool=-1), "warm_pool: got -1, expected at least 0"),
        (lambda: FleetSettings(NEW, max_creates=-1), "max_creates: got -1, expected at least 0"),
        (lambda: FleetSettings(NEW, max_surge=0), "max_surge: got 0, expected at least 1"),
        (lambda: FleetSettings(NEW, start_deadline_s=0), "start_deadline_s: got 0, expected more"),
        (lambda: SandboxShape(capacity=0), "capacity: got 0, expected at least 1"),
        (
            lambda: SandboxShape(memory_limit_bytes=0),
            "memory_limit_bytes: got 0, expected at least 1",
        ),
        (lambda: FunctionDemand("f", -1), "replicas: got -1, expected at least 0"),
        (lambda: FunctionDemand("f", 1, -1), "memory_bytes: got -1, expected at least 0"),
    ],
)
def test_rejects_invalid_settings(build: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build()


def blocks(*names: str) -> list[FunctionDemand]:
    """Demands of functions such as "0a": blocks a, b, … of layer 0."""
    return [FunctionDemand(name, 1, anti_affinity_key=name[0]) for name in names]


def block(name: str) -> Assignment:
    return Assignment(name, anti_affinity_key=name[0])


def functions_by_sandbox(planned: SandboxPlan) -> dict[str, list[str]]:
    functions: dict[str, list[str]] = {}
    for action in planned.actions:
        if isinstance(action, Attach):
            functions.setdefault(action.sandbox, []).append(action.function)
    return functions


def test_blocks_of_a_layer_are_placed_in_different_sandboxes() -> None:
    demands = blocks("0a", "0b", "1a", "1b", "2a", "2b")
    planned = plan_with(demands, sandbox("a"), sandbox("b"), shape=SandboxShape(capacity=3))
    assert functions_by_sandbox(planned) == {"a": ["0a", "1a", "2a"], "b": ["0b", "1b", "2b"]}


def test_blocks_of_different_layers_share_a_sandbox_first() -> None:
    demands = blocks("0a", "0b", "1a", "1b")
    planned = plan_with(demands, sandbox("a"), shape=SandboxShape(capacity=2))
    assert planned.actions == (
        Attach("a", "0a", DEMAND),
        Attach("a", "1a", DEMAND),
        Create(1, DEMAND),
    )


def test_anti_affinity_needs_no_additional_sandbox() -> None:
    planned = plan_with(
        blocks("0a", "0b"), sandbox("a"), sandbox("b"), shape=SandboxShape(capacity=2)
    )
    assert functions_by_sandbox(planned) == {"a": ["0a", "0b"]}


def test_block_is_placed_with_blocks_of_other_layers() -> None:
    full = sandbox("a", block("0a"), block("2a"))
    other = sandbox("b", block("1a"))
    planned = plan_with(blocks("0a", "2a", "1a", "0b"), full, other, shape=SandboxShape(capacity=3))
    assert functions_by_sandbox(planned) == {"b": ["0b"]}
