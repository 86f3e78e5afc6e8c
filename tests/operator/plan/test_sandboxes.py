"""Rounds worked out by hand; one function a sandbox and a pool of 0 if not said otherwise."""

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
    chosen = FleetSettings(**{"template_hash": NEW, "warm_pool": 0, **settings})
    return plan_sandboxes(chosen, demands, sandboxes=sandboxes, now=NOW)


def actions(
    *sandboxes: ObservedSandbox, want: dict[str, int] | None = None, **settings: Any
) -> list[Action]:
    return list(plan(*sandboxes, want=want, **settings).actions)


def test_nothing_wanted_and_no_pool_needs_no_sandbox() -> None:
    assert actions(want={"f": 0}) == []


def test_nothing_wanted_and_no_pool_leaves_no_sandbox() -> None:
    assert actions(sandbox("a"), sandbox("b")) == [Delete("a", IDLE), Delete("b", IDLE)]


def test_an_empty_fleet_gets_a_sandbox_for_each_replica_and_the_pool() -> None:
    assert actions(want={"f": 2, "g": 1}, warm_pool=1) == [Create(3, DEMAND), Create(1, POOL)]


def test_the_warm_pool_is_used_first_and_refilled_in_the_same_round() -> None:
    got = actions(sandbox("a"), sandbox("b"), want={"f": 1}, warm_pool=2)
    assert got == [Attach("a", "f", DEMAND), Create(1, POOL)]


def test_a_pool_that_is_full_is_left_alone() -> None:
    assert actions(sandbox("a", "f"), sandbox("b"), want={"f": 1}, warm_pool=1) == []


def test_a_starting_sandbox_counts_for_the_pool() -> None:
    assert actions(starting("a"), warm_pool=1) == []


def test_a_starting_sandbox_is_never_reaped() -> None:
    assert actions(starting("a"), starting("b")) == []


def test_the_newest_beyond_the_pool_are_deleted_ready_ones_only() -> None:
    got = actions(
        sandbox("a", created_at=3),
        sandbox("b", created_at=1),
        sandbox("c", created_at=2),
        starting("d"),
        warm_pool=1,
    )
    assert got == [Delete("c", IDLE), Delete("a", IDLE)]


def test_a_missing_replica_waits_for_a_sandbox_that_starts() -> None:
    assert actions(starting("a"), want={"f": 1}) == []


def test_a_place_kept_for_a_function_is_not_of_the_pool() -> None:
    # The sandbox that starts is for f; the pool needs one more.
    assert actions(starting("a"), want={"f": 1}, warm_pool=1) == [Create(1, POOL)]


def test_a_missing_replica_waits_for_a_place_that_is_being_freed() -> None:
    leaving = Assignment("f", DETACHING)
    assert actions(sandbox("a", leaving), want={"f": 0, "g": 1}) == []
    # Freed in this very round.
    got = actions(sandbox("a", "f"), want={"f": 0, "g": 1})
    assert got == [Detach("a", "f", SURPLUS)]


def test_a_sandbox_being_freed_counts_for_the_pool_and_is_not_deleted_yet() -> None:
    assert actions(sandbox("a", Assignment("f", DETACHING)), warm_pool=1) == []
    assert actions(sandbox("a", Assignment("f", DETACHING)), warm_pool=0) == []


def test_first_replicas_come_before_second_ones_and_urgent_functions_first() -> None:
    got = actions(sandbox("a"), sandbox("b"), sandbox("c"), want={"hot": 3, "cold": 1})
    assert got == [
        Attach("a", "hot", DEMAND),
        Attach("b", "cold", DEMAND),
        Attach("c", "hot", DEMAND),
        Create(1, DEMAND),
    ]


def test_the_replicas_of_a_function_never_share_a_sandbox() -> None:
    got = actions(sandbox("a", "f"), want={"f": 2}, shape=SandboxShape(capacity=4))
    assert got == [Create(1, DEMAND)]
    got = actions(sandbox("a", "f"), sandbox("b"), want={"f": 3}, shape=SandboxShape(capacity=4))
    assert got == [Attach("b", "f", DEMAND), Create(1, DEMAND)]


def test_not_even_with_a_replica_that_is_leaving() -> None:
    leaving = sandbox("a", Assignment("f", DETACHING))
    assert actions(leaving, want={"f": 1}, shape=SandboxShape(capacity=4)) == []


def test_sandboxes_in_use_are_filled_before_generic_ones() -> None:
    got = actions(
        sandbox("a", created_at=1),
        sandbox("b", "x", created_at=2),
        sandbox("c", "y", "z", created_at=3),
        want={"f": 1, "g": 1, "h": 1, "x": 1, "y": 1, "z": 1},
        shape=SandboxShape(capacity=3),
        warm_pool=1,
    )
    assert got == [Attach("c", "f", DEMAND), Attach("b", "g", DEMAND), Attach("b", "h", DEMAND)]


def test_new_sandboxes_are_shared_as_far_as_their_capacity_goes() -> None:
    # 5 functions of one replica and one of two: ceil(7 / 3) = 3 sandboxes.
    want = dict.fromkeys("abcde", 1) | {"f": 2}
    assert actions(want=want, shape=SandboxShape(capacity=3)) == [Create(3, DEMAND)]


def test_memory_limits_what_shares_a_sandbox() -> None:
    # 100 bytes: 60 + 30 fit, the other 60 does not.
    demands = [FunctionDemand("f", 1, 60), FunctionDemand("g", 1, 60), FunctionDemand("h", 1, 30)]
    shape = SandboxShape(capacity=4, memory_limit_bytes=100)
    got = plan_with(demands, sandbox("a"), shape=shape)
    assert got.actions == (
        Attach("a", "f", DEMAND),
        Attach("a", "h", DEMAND),
        Create(1, DEMAND),
    )


def test_memory_of_a_function_that_leaves_is_taken_until_it_is_gone() -> None:
    shape = SandboxShape(capacity=4, memory_limit_bytes=100)
    full = sandbox("a", Assignment("f", DETACHING, memory_bytes=60))
    assert plan_with([FunctionDemand("g", 1, 60)], full, shape=shape).actions == ()
    room = sandbox("a", Assignment("f", DETACHING, memory_bytes=40))
    got = plan_with([FunctionDemand("g", 1, 60)], room, shape=shape)
    assert got.actions == (Attach("a", "g", DEMAND),)


def test_a_place_kept_for_one_function_is_not_given_to_another() -> None:
    # 100 bytes, 60 of them about to be free. f (80) waits for them; g (30) would fit into the 40
    # that are free now, but then f would not.
    room = sandbox("a", Assignment("x", DETACHING, memory_bytes=60))
    demands = [FunctionDemand("f", 1, 80), FunctionDemand("g", 1, 30)]
    got = plan_with(demands, room, shape=SandboxShape(capacity=4, memory_limit_bytes=100))
    assert got.actions == (Create(1, DEMAND),)
    # Beside an f of 70 there is room for both.
    demands = [FunctionDemand("f", 1, 70), FunctionDemand("g", 1, 30)]
    got = plan_with(demands, room, shape=SandboxShape(capacity=4, memory_limit_bytes=100))
    assert got.actions == (Attach("a", "g", DEMAND),)


def test_a_function_larger_than_any_sandbox_is_named_and_nothing_is_created_for_it() -> None:
    got = plan_with(
        [FunctionDemand("f", 2, 101), FunctionDemand("g", 0, 101)], shape=SandboxShape(1, 100)
    )
    assert got == SandboxPlan((), unschedulable=("f",))


def test_a_sandbox_that_has_the_room_takes_what_a_new_one_would_not() -> None:
    roomy = sandbox("a", shape=SandboxShape(1, 200))
    got = plan_with([FunctionDemand("f", 2, 150)], roomy, shape=SandboxShape(1, 100))
    assert got == SandboxPlan((Attach("a", "f", DEMAND),), unschedulable=("f",))


def test_creations_of_one_round_are_bounded_and_callers_come_before_the_pool() -> None:
    want = dict.fromkeys("abcde", 1)
    assert actions(want=want, warm_pool=3, max_creates=4) == [Create(4, DEMAND)]
    assert actions(want=want, warm_pool=3, max_creates=7) == [Create(5, DEMAND), Create(2, POOL)]


def test_nothing_is_created_while_creation_is_backed_off() -> None:
    assert actions(sandbox("a"), want={"f": 1, "g": 1}, warm_pool=2, max_creates=0) == [
        Attach("a", "f", DEMAND)
    ]


def test_the_least_recently_used_surplus_replica_goes() -> None:
    got = actions(
        sandbox("a", Assignment("f", last_used=30)),
        sandbox("b", Assignment("f", last_used=10)),
        sandbox("c", Assignment("f", last_used=20)),
        want={"f": 1},
    )
    assert got == [Detach("b", "f", SURPLUS), Detach("c", "f", SURPLUS)]


def test_an_attach_under_way_is_left_to_finish() -> None:
    got = actions(sandbox("a", Assignment("f", ATTACHING)), want={"f": 0})
    assert got == []
    # One serves and one is wanted: the other is surplus once it serves, not now.
    pair = [sandbox("a", "f"), sandbox("b", Assignment("f", ATTACHING))]
    assert actions(*pair, want={"f": 1}) == []


def test_an_attach_under_way_counts_as_a_replica() -> None:
    assert actions(sandbox("a", Assignment("f", ATTACHING)), want={"f": 1}) == []


def test_a_replica_that_leaves_does_not_count() -> None:
    got = actions(sandbox("a", Assignment("f", DETACHING)), sandbox("b"), want={"f": 1})
    assert got == [Attach("b", "f", DEMAND)]


def test_functions_of_no_plan_are_detached() -> None:
    got = actions(sandbox("a", "stranger"), sandbox("b", "f"), want={"f": 1})
    assert got == [Detach("a", "stranger", ActionReason.NOT_PLANNED)]


def test_a_failed_sandbox_is_deleted_and_its_functions_go_elsewhere() -> None:
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


def test_a_sandbox_that_does_not_get_ready_by_its_deadline_is_replaced() -> None:
    settings: dict[str, Any] = {"warm_pool": 1, "start_deadline_s": 60.0}
    assert actions(starting("a", created_at=NOW - 60), **settings) == []
    assert actions(starting("a", created_at=NOW - 60.1), **settings) == [
        Create(1, POOL),
        Delete("a", ActionReason.START_TIMED_OUT),
    ]


def test_a_draining_sandbox_takes_nothing_and_is_not_deleted_twice() -> None:
    draining = sandbox("a", "f", state=SandboxState.DRAINING)
    assert actions(draining, want={"f": 1}) == [Create(1, DEMAND)]


def test_an_old_template_is_replaced_step_by_step_and_the_function_served_throughout() -> None:
    def step(*sandboxes: ObservedSandbox) -> list[Action]:
        return actions(*sandboxes, want={"f": 1})

    old = sandbox("a", "f", template=OLD, created_at=1)
    assert step(old) == [Create(1, TEMPLATE)]
    assert step(old, starting("b")) == []
    assert step(old, sandbox("b")) == [Attach("b", "f", TEMPLATE)]
    assert step(old, sandbox("b", Assignment("f", ATTACHING))) == []
    assert step(old, sandbox("b", "f")) == [Detach("a", "f", TEMPLATE)]
    leaving = sandbox("a", Assignment("f", DETACHING), template=OLD)
    assert step(leaving, sandbox("b", "f")) == []
    assert step(sandbox("a", template=OLD), sandbox("b", "f")) == [Delete("a", TEMPLATE)]
    assert step(sandbox("b", "f")) == []


def test_replacements_under_way_are_bounded() -> None:
    fleet = [sandbox(name, name.upper(), template=OLD) for name in "abcd"]
    want = dict.fromkeys("ABCD", 1)
    assert actions(*fleet, want=want, max_surge=2) == [Create(2, TEMPLATE)]
    begun = sandbox("n", Assignment("A", ATTACHING))
    assert actions(*fleet, begun, want=want, max_surge=2) == [Create(1, TEMPLATE)]
    assert actions(*fleet, begun, want=want, max_surge=1) == []


def test_the_oldest_sandboxes_are_replaced_first() -> None:
    got = actions(
        sandbox("a", "f", template=OLD, created_at=5),
        sandbox("b", "g", template=OLD, created_at=4),
        sandbox("c"),
        want={"f": 1, "g": 1},
    )
    assert got == [Attach("c", "g", TEMPLATE)]


def test_a_missing_replica_comes_before_a_replacement() -> None:
    got = actions(sandbox("a", "f", template=OLD), sandbox("b"), want={"f": 1, "g": 1})
    assert got == [Attach("b", "g", DEMAND), Create(1, TEMPLATE)]


def test_a_function_made_complete_in_this_round_gets_its_replacement_too() -> None:
    got = actions(sandbox("a", "f", template=OLD), sandbox("b"), sandbox("c"), want={"f": 2})
    assert got == [Attach("b", "f", DEMAND), Attach("c", "f", TEMPLATE)]


def test_a_replica_that_is_being_attached_is_not_replaced_yet() -> None:
    begun = sandbox("a", Assignment("f", ATTACHING), template=OLD)
    assert actions(begun, want={"f": 1}) == []


def test_an_old_generic_sandbox_serves_the_pool_until_a_new_one_is_ready() -> None:
    old = sandbox("a", template=OLD)
    assert actions(old, warm_pool=1) == [Create(1, POOL)]
    assert actions(old, starting("b"), warm_pool=1) == []
    assert actions(old, sandbox("b"), warm_pool=1) == [Delete("a", TEMPLATE)]


def test_an_old_generic_sandbox_is_used_rather_than_letting_callers_wait() -> None:
    got = actions(sandbox("a", template=OLD), starting("b"), want={"f": 1}, warm_pool=1)
    assert got == [Attach("a", "f", DEMAND)]
    got = actions(sandbox("a", template=OLD), sandbox("b"), want={"f": 1})
    assert got == [Attach("b", "f", DEMAND), Delete("a", TEMPLATE)]


def test_surplus_replicas_of_an_old_template_go_first() -> None:
    got = actions(
        sandbox("a", Assignment("f", last_used=99), template=OLD),
        sandbox("b", Assignment("f", last_used=1)),
        want={"f": 1},
    )
    assert got == [Detach("a", "f", TEMPLATE)]


def test_an_old_sandbox_that_nobody_needs_just_goes() -> None:
    got = actions(sandbox("a", "f", template=OLD), want={"f": 0})
    assert got == [Detach("a", "f", SURPLUS)]


def test_a_function_too_large_for_the_new_template_keeps_its_old_sandbox() -> None:
    old = sandbox("a", "f", template=OLD)
    got = plan_with([FunctionDemand("f", 1, 101)], old, shape=SandboxShape(1, 100))
    assert got == SandboxPlan((), unschedulable=("f",))


def test_an_old_sandbox_takes_what_its_own_shape_allows() -> None:
    old = sandbox("a", "f", template=OLD, shape=SandboxShape(capacity=1))
    got = actions(old, want={"f": 1, "g": 1}, shape=SandboxShape(capacity=4))
    # g has no room in a, whatever new sandboxes can take; f's replacement will share g's.
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
def test_numbers_that_no_fleet_could_have_are_refused(build: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build()


def blocks(*names: str) -> list[FunctionDemand]:
    """Demands of functions such as "0a": blocks a, b, … of layer 0."""
    return [FunctionDemand(name, 1, anti_affinity_key=name[0]) for name in names]


def block(name: str) -> Assignment:
    return Assignment(name, anti_affinity_key=name[0])


def functions_by_sandbox(found: SandboxPlan) -> dict[str, list[str]]:
    held: dict[str, list[str]] = {}
    for action in found.actions:
        if isinstance(action, Attach):
            held.setdefault(action.sandbox, []).append(action.function)
    return held


def test_blocks_of_a_layer_go_into_different_sandboxes() -> None:
    wanted = blocks("0a", "0b", "1a", "1b", "2a", "2b")
    found = plan_with(wanted, sandbox("a"), sandbox("b"), shape=SandboxShape(capacity=3))
    assert functions_by_sandbox(found) == {"a": ["0a", "1a", "2a"], "b": ["0b", "1b", "2b"]}


def test_blocks_wait_for_a_sandbox_of_their_own_only_if_there_are_too_many() -> None:
    wanted = blocks("0a", "0b", "1a", "1b")
    found = plan_with(wanted, sandbox("a"), shape=SandboxShape(capacity=2))
    assert found.actions == (
        Attach("a", "0a", DEMAND),
        Attach("a", "1a", DEMAND),
        Create(1, DEMAND),
    )


def test_keeping_blocks_apart_costs_no_further_sandbox() -> None:
    found = plan_with(
        blocks("0a", "0b"), sandbox("a"), sandbox("b"), shape=SandboxShape(capacity=2)
    )
    assert functions_by_sandbox(found) == {"a": ["0a", "0b"]}


def test_a_block_goes_beside_blocks_of_other_layers() -> None:
    full = sandbox("a", block("0a"), block("2a"))
    other = sandbox("b", block("1a"))
    found = plan_with(blocks("0a", "2a", "1a", "0b"), full, other, shape=SandboxShape(capacity=3))
    assert functions_by_sandbox(found) == {"b": ["0b"]}
